"""What the pairs come to, against what is promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from warmkv_bench.config import State
from warmkv_bench.stats import Estimate, estimate
from warmkv_bench.tables import NOTHING, Table
from warmkv_bench.tiers.pairs import TierSample

WARM_FACTOR, WARM_MS = 1.15, 5.0
"""A warm request may take so many times a hot one, and so many milliseconds on top."""
COLD_READ_FACTOR = 1.3
"""With the page cache dropped it may take a hot one and so many plain cold reads of the same bytes."""


@dataclass(frozen=True, slots=True)
class TierFigures:
    """Medians of one context size in milliseconds, from valid samples; None where there are none."""

    context_tokens: int
    bytes_loaded: int
    hot: Estimate | None
    warm: Estimate | None
    dropped: Estimate | None
    cold_read: Estimate | None
    load: Estimate | None
    invalid: int
    uncontrolled: int

    @property
    def warm_limit(self) -> float | None:
        return None if self.hot is None else WARM_FACTOR * self.hot.median + WARM_MS

    @property
    def dropped_limit(self) -> float | None:
        if self.hot is None or self.cold_read is None:
            return None
        return self.hot.median + COLD_READ_FACTOR * self.cold_read.median

    @property
    def misses(self) -> list[str]:
        """Each promise that does not hold, in words."""
        found = []
        for state, got, limit in (("warm", self.warm, self.warm_limit), ("dropped", self.dropped, self.dropped_limit)):
            if got is not None and limit is not None and got.median > limit:
                found.append(f"{self.context_tokens:,} tokens {state}: {got.median:.1f} ms, limit {limit:.1f} ms")
        return found


def figures(samples: Sequence[TierSample]) -> list[TierFigures]:
    """One for each context size, in order."""
    return [
        _of_size([sample for sample in samples if sample.context_tokens == context])
        for context in sorted({sample.context_tokens for sample in samples})
    ]


def tiers_table(found: Sequence[TierFigures]) -> Table:
    rows = [
        (
            f"{one.context_tokens:,}",
            _shown(one.hot),
            _shown(one.warm),
            _limit(one.warm_limit),
            _shown(one.load),
            _shown(one.dropped),
            _shown(one.cold_read),
            _limit(one.dropped_limit),
            f"{one.bytes_loaded / (1 << 20):,.1f}",
            str(one.invalid),
        )
        for one in found
    ]
    columns = (
        "Context",
        "hot",
        "warm",
        f"limit: {WARM_FACTOR} hot + {WARM_MS:g}",
        "of it load",
        "pages dropped",
        "plain cold read",
        f"limit: hot + {COLD_READ_FACTOR} cold read",
        "MiB",
        "invalid",
    )
    return Table("Time to first token, ms", columns, rows)


def _of_size(samples: Sequence[TierSample]) -> TierFigures:
    good = [sample for sample in samples if sample.invalid_reason is None]
    by_state = {state: [sample for sample in good if sample.state == state] for state in State}
    dropped = [sample for sample in by_state[State.WARM_DROPPED] if sample.page_cache == "dropped"]
    warm = by_state[State.WARM]
    return TierFigures(
        context_tokens=samples[0].context_tokens,
        bytes_loaded=max((sample.bytes_loaded for sample in warm), default=0),
        hot=_ttft(by_state[State.HOT]),
        warm=_ttft(warm),
        dropped=_ttft(dropped),
        cold_read=estimate([sample.cold_read_ms for sample in dropped if sample.cold_read_ms is not None]),
        load=estimate([sample.server["load"] for sample in warm]),
        invalid=len(samples) - len(good),
        uncontrolled=len(by_state[State.WARM_DROPPED]) - len(dropped),
    )


def _ttft(samples: Sequence[TierSample]) -> Estimate | None:
    return estimate([sample.ttft_ms for sample in samples if sample.ttft_ms is not None])


def _shown(found: Estimate | None) -> str:
    if found is None:
        return NOTHING
    between = f" [{found.ci95[0]:.1f}, {found.ci95[1]:.1f}]" if found.ci95 else ""
    return f"{found.median:.1f}{between}"


def _limit(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"
