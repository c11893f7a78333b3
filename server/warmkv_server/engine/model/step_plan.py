"""What one step of the model does, as a value.

A plan is made of plain numbers and strings: who takes part, which tokens are fed and where, what they are padded to and
how far attention reads. So it can be printed, compared, logged, and carried out elsewhere: to whoever holds the same
sequences' caches it says the same step. Whoever makes one looks into no array; whoever carries it out decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

NOBODY = -1
"""`Row.ident` of a step that is run to find something out about the model."""


class StepKind(StrEnum):
    PREFILL = "prefill"
    """A chunk of prompts."""
    DECODE = "decode"
    """One token a row, whose logits choose the next one."""
    VERIFY = "verify"
    """A row's last token and a guess of what follows it."""
    PROBE = "probe"
    """Nobody's: what it takes or gives tells something about the model."""


class Wanted(StrEnum):
    """What is to come of a step besides the KV of what is fed."""

    NOTHING = "nothing"
    LOGITS = "logits"
    HIDDEN = "hidden states"


class Row(NamedTuple):
    """One sequence's part of a step.

    Attributes:
        ident: the engine's number for the sequence.
        start: position of the first token that is fed: so many have their KV in the caches.
        tokens: that are fed; None for the one that was chosen for it last, which may still be on the device.
    """

    ident: int
    start: int
    tokens: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        return 1 if self.tokens is None else len(self.tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One call of the model.

    Attributes:
        rows: in the order of the batch.
        fed: tokens of every row, those behind its own that it is padded with included.
        read: length of the context that attention reads in layers that keep every token.
    """

    kind: StepKind
    rows: tuple[Row, ...]
    fed: int
    read: int
    wanted: Wanted

    @classmethod
    def probe(cls, tokens: Sequence[int], start: int = 0, wanted: Wanted = Wanted.LOGITS) -> StepPlan:
        """To feed these tokens of nobody's behind so many others, and see what comes of it."""
        row = Row(NOBODY, start, tuple(tokens))
        return cls(StepKind.PROBE, (row,), row.length, start + row.length, wanted)

    def __str__(self) -> str:
        """One line, without the tokens themselves."""
        rows = ", ".join(f"#{row.ident} {row.start}+{row.length}" for row in self.rows)
        return f"{self.kind} of {rows}; {self.fed} fed a row, {self.read} read, {self.wanted} wanted"
