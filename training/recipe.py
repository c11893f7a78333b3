"""The recipe: which text at which length, and how fast to learn; the same for both back ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .prepare import Stream, load
from .tokenizer import BOS_ID

_WARM_UP = 0.01  # of all steps
_LOWEST_RATE = 0.02  # of the peak


@dataclass(frozen=True)
class Phase:
    """``share`` of all tokens, in rows of ``length`` tokens, drawn from streams with the weights ``mix``."""

    share: float
    length: int
    mix: dict[str, float]


BASIS = (
    Phase(0.67, 1_024, {"documents": 0.5, "short": 0.45, "medium": 0.05}),
    Phase(0.23, 4_096, {"documents": 0.3, "shelves": 0.2, "short": 0.25, "medium": 0.25}),
    Phase(0.10, 32_768, {"shelves": 0.35, "short": 0.3, "medium": 0.15, "long": 0.2}),
)
"""From random weights."""

FINISH = (
    Phase(0.2, 16_384, {"shelves": 0.45, "medium": 0.25, "long": 0.2, "facts": 0.1}),
    Phase(0.8, 2_048, {"shelves": 0.25, "medium": 0.15, "short": 0.15, "facts": 0.45}),
)
"""From the weights that `BASIS` ends with: fewer facts, more often."""


@dataclass(frozen=True)
class Plan:
    """How much to train: ``tokens`` in all, ``batch`` tokens a step, peak learning rates.

    The layers' matrices are trained with Muon (Jordan et al., 2024: momentum made orthogonal by Newton-Schulz
    iterations), the embedding and the norms with AdamW. Over 70M tokens, AdamW alone at a rate of 4e-3 ended 1.0 nats
    a token higher.
    """

    tokens: int
    batch: int = 262_144
    matrix_rate: float = 0.03
    vector_rate: float = 4e-3
    matrix_decay: float = 0.02
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 1
    phases: tuple[Phase, ...] = BASIS

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(self._steps(phase) for phase in self.phases)

    def _steps(self, phase: Phase) -> int:
        return max(1, round(self.tokens * phase.share / self.batch))

    def rate_at(self, step: int) -> float:
        """What the peak rates are multiplied by: a linear warm-up, then half a cosine."""
        warm_up = max(1, int(self.steps * _WARM_UP))
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.steps - warm_up)
        return _LOWEST_RATE + (1 - _LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * done))

    def batches(self, folder: Path) -> Iterator[npt.NDArray[np.int32]]:
        """One array ``(rows, length + 1)`` a step: inputs are all but the last column, targets all but the first."""
        rng = np.random.default_rng(self.seed)
        streams: dict[str, Stream] = {}
        for phase in self.phases:
            for name in phase.mix:
                if name not in streams:
                    streams[name] = load(folder / f"{name}.npz")
            for _ in range(self._steps(phase)):
                yield _rows(phase, streams, max(1, self.batch // phase.length), rng)


def basis(tokens: int = 1_750_000_000) -> Plan:
    """The first training."""
    return Plan(tokens)


def finish(tokens: int = 130_000_000) -> Plan:
    """The second, at a third of the rates."""
    return Plan(tokens, batch=131_072, matrix_rate=0.01, vector_rate=1.4e-3, seed=2, phases=FINISH)


def _rows(phase: Phase, streams: dict[str, Stream], rows: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    names = rng.choice(list(phase.mix), size=rows, p=np.array(list(phase.mix.values())))
    batch = np.empty((rows, phase.length + 1), dtype=np.int32)
    for row, name in enumerate(names):
        batch[row] = _row(streams[name], name, phase.length + 1, rng)
    return batch


def _row(stream: Stream, name: str, length: int, rng: np.random.Generator) -> npt.NDArray[np.uint16]:
    """Documents are cut anywhere, conversations begin where they begin. Like every context, a row starts with BOS."""
    if name in ("documents", "shelves"):
        start = int(rng.integers(len(stream.tokens)))
    else:
        start = int(rng.choice(stream.starts))
    row = stream.tokens[start : start + length]
    while len(row) < length:  # past the end of the stream: go on at its beginning
        row = np.concatenate([row, stream.tokens[: length - len(row)]])
    row = row.copy()
    row[0] = BOS_ID
    return row
