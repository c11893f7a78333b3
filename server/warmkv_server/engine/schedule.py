"""Who runs next: admission, and whose prefill gets the next chunk."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

from warmkv_server.engine.fairness import FairLine
from warmkv_server.engine.group import PADDING, little_padding
from warmkv_server.engine.need import Need
from warmkv_server.engine.sequence import Sequence


def together(needs: Sequences[Need], sharing: Sequences[Need] = ()) -> int:
    """Bytes that requests take at most while they run beside each other. Rows of a batch are padded to one length.

    Args:
        sharing: of those among them whose prompts are prefilled in one chunk, for which they become a batch.
    """
    if not needs:
        return 0
    alone = len(needs) == 1
    share = 1.0 if alone else 1 - PADDING
    copied = 0 if alone else sum(need.copied for need in needs)
    steps = max(need.step for need in needs)
    chunk = sum(need.step for need in sharing)
    return int(sum(need.held for need in needs) / share + max(copied / share + chunk, steps))


@dataclass
class Schedule:
    """Waiting and prefilling sequences.

    Attributes:
        max_running: sequences prefilling or decoding at once.
        budget: bytes that all of them may take together.
    """

    max_running: int
    budget: int
    waiting: FairLine[Sequence] = field(default_factory=FairLine)
    prefilling: list[Sequence] = field(default_factory=list)
    _turn: int = 0

    def admit(self, running: Sequences[Sequence]) -> Sequence | None:
        """The next waiting sequence, if there is room for it now: tenants take turns, each in order of arrival.

        One for which memory ran out has its second try alone.
        """
        if not self.waiting or len(running) >= self.max_running:
            return None
        first = self.waiting.first
        if running and (first.rewound or together([first.need, *(each.need for each in running)]) > self.budget):
            return None
        self.prefilling.append(self.waiting.take())
        return first

    def mates(self, first: Sequence, running: Sequences[Sequence], most: int, tokens: int) -> list[Sequence]:
        """`first`, and those whose prompts can be prefilled in one chunk with its own: new agents' short ones.

        Args:
            running: all that wait no longer.
            most: tokens that each may have.
            tokens: that the chunk may have, padding included.
        """
        found = [first]
        if not _is_short(first, most):
            return found
        needs = [sequence.need for sequence in running]
        for sequence in self.prefilling:
            rows = [*found, sequence]
            lengths = [row.prefill_end for row in rows]
            if (
                sequence is not first
                and _is_short(sequence, most)
                and len(rows) * max(lengths) <= tokens
                and little_padding(lengths)
                and together(needs, [row.need for row in rows]) <= self.budget
            ):
                found = rows
        return found

    def pick(self) -> Sequence | None:
        """Whose prefill gets the next chunk.

        The one with the least left, so that an agent that comes back with thirty new tokens doesn't wait for another's
        thirty thousand; every second time the one that came first, so that nobody starves.
        """
        if not self.prefilling:
            return None
        self._turn += 1
        if self._turn % 2 == 0:
            return self.prefilling[0]
        return min(self.prefilling, key=lambda sequence: sequence.left)


def _is_short(sequence: Sequence, most: int) -> bool:
    """Whether it has not begun, has so few tokens, and its caches can all be cut, and so padded."""
    return (
        sequence.wants_token
        and sequence.left == sequence.prefill_end <= most
        and not (sequence.apart or sequence.rewound)
        and sequence.loaded.cache_map.can_be_cut
    )
