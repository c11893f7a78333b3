"""Memory pressure: between the engine, which meets it, and whoever holds memory that can be spared."""

from __future__ import annotations

from collections.abc import Callable


class MemoryPressure:
    """The machine's memory has run out now and then. Used on the event loop."""

    def __init__(self) -> None:
        self._holders: list[Callable[[], object]] = []

    def listen(self, let_go: Callable[[], object]) -> None:
        """Have `let_go` called whenever memory has run out: to let go of what can be spared."""
        self._holders.append(let_go)

    def relieve(self) -> None:
        """Have everybody let go of what they can spare."""
        for let_go in self._holders:
            let_go()
