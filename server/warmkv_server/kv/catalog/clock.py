"""The store's own time: seconds that only move forward, whatever the machine's clock is set to.

Lifetimes, the order of use and the keeping of outcomes go by it. Within a run it advances with the time since the
machine booted, suspends included where the system counts them. At start it advances by what has passed since it was
last written down: by the time since boot, if the machine hasn't booted since; else by the wall clock, and never by less
than nothing. What people are shown is the wall's: see `Clock.shown`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""macOS has no clock of that name; there CLOCK_MONOTONIC counts suspends."""
_STEP = 1.0
"""Seconds; the wall clock was set if it and the store's time have come further apart."""
LATEST = 253402300799.0
"""The last second that a Timestamp can say: the end of the year 9999."""


def _elapsed() -> float:
    return time.clock_gettime(_ELAPSED)


def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class TimeSource:
    """The machine's clocks. Tests have others.

    Attributes:
        wall: seconds since 1970; goes where it is set.
        elapsed: seconds since boot; only moves forward.
        boot: another text for each boot; "" where the system doesn't tell.
    """

    wall: Callable[[], float] = time.time
    elapsed: Callable[[], float] = _elapsed
    boot: Callable[[], str] = _boot


@dataclass(frozen=True)
class Reading:
    """What is written down of a clock.

    Attributes:
        time: of the store.
        wall, elapsed, boot: of the machine at that moment.
        shift: what the wall was ahead.
        away: seconds of `time` in which no server ran.
    """

    time: float
    wall: float
    elapsed: float
    boot: str
    shift: float
    away: float

    @classmethod
    def of_row(cls, row: Iterable[object]) -> Self | None:
        """None if it makes no sense."""
        now, wall, elapsed, boot, shift, away = row
        numbers = [value for value in (now, wall, elapsed, shift, away) if isinstance(value, float)]
        if len(numbers) < 5 or not all(map(math.isfinite, numbers)) or not 0 <= numbers[0] <= LATEST:
            return None
        return cls(numbers[0], numbers[1], numbers[2], str(boot), numbers[3], numbers[4])

    def passed(self, wall: float, elapsed: float, boot: str) -> float:
        """Seconds from this reading to one that says so, as far as they can be known."""
        if boot and boot == self.boot and elapsed >= self.elapsed:
            return elapsed - self.elapsed
        return max(wall - self.wall, 0.0)


class Clock:
    """Thread-safe, but for `shown`, which is the event loop's."""

    def __init__(
        self, kept: Reading | None = None, used: Iterable[float] = (), source: TimeSource | None = None
    ) -> None:
        """
        Args:
            kept: the last reading, if there is one.
            used: moments of the store's time that have been, as far as they are known otherwise.
        """
        self._source = source or TimeSource()
        wall, elapsed, boot = self._source.wall(), self._source.elapsed(), self._source.boot()
        newest = max((moment for moment in used if 0 <= moment <= LATEST), default=0.0)
        if kept is None:
            begun = newest or max(wall, 0.0)
            kept = Reading(begun, begun, elapsed, "", 0.0, 0.0)
        passed = kept.passed(wall, elapsed, boot)
        self._boot = boot
        self._base = max(kept.time + passed, newest) - elapsed
        self._away = kept.away + passed
        self._shift = kept.shift

    def now(self) -> float:
        """About seconds since 1970; exactly that as long as nobody has set the machine's clock."""
        return self._base + self._source.elapsed()

    def awake(self) -> float:
        """Seconds, of which only those count in which a server ran: no wrong clock at a start moves it."""
        return self.now() - self._away

    def shown(self, moment: float) -> float:
        """A moment of the store's time in seconds since 1970, such that its distance from the wall's present is right.

        The same moment is shown the same for as long as nobody sets the machine's clock.
        """
        drift = self._source.wall() - self.now() - self._shift
        if abs(drift) > _STEP:
            self._shift += drift
        return min(max(moment + self._shift, 0.0), LATEST)

    def reading(self) -> Reading:
        """For the next start."""
        return Reading(self.now(), self._source.wall(), self._source.elapsed(), self._boot, self._shift, self._away)
