"""How long a run will take: costs of its steps as functions of the context, fitted to what was measured so far.

A prefill of n tokens costs a·n + b·n² (projections, and attention over what came before). Everything else, such as
loading n tokens and decoding behind them, costs a constant and something for each token: c + d·n.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warmkv_bench.config import Isolation, State
from warmkv_bench.plan import Round

# Steps of a round, besides a step for each State.
PREFILL = "prefill"
PRIME = "prime"


@dataclass(frozen=True, slots=True)
class Curve:
    """constant + linear·n + quadratic·n², in seconds for n tokens. No part is negative."""

    constant: float
    linear: float
    quadratic: float

    def at(self, tokens: int) -> float:
        return self.constant + self.linear * tokens + self.quadratic * tokens * tokens


def fit(points: Sequence[tuple[int, float]], powers: tuple[int, int]) -> Curve:
    """Fits two non-negative powers of n to (tokens, seconds), with relative errors counted alike.

    With one size alone only the leading part of `powers` that a single size can tell is fitted: the first.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("a curve needs at least one point")
    sizes = np.array([tokens for tokens, _ in points], dtype=np.float64)
    seconds = np.maximum(np.array([s for _, s in points], dtype=np.float64), 1e-9)
    choices: list[tuple[int, ...]] = [(powers[0],)]
    if len(set(sizes.tolist())) > 1:
        choices += [(powers[1],), powers]
    best: tuple[float, dict[int, float]] | None = None
    for chosen in choices:
        basis = np.stack([sizes**power for power in chosen], axis=1) / seconds[:, None]
        coefficients, *_ = np.linalg.lstsq(basis, np.ones_like(seconds), rcond=None)
        if (coefficients < 0).any():
            continue
        error = float(np.square(basis @ coefficients - 1).sum())
        if best is None or error < best[0] - 1e-12:
            best = (error, dict(zip(chosen, _floats(coefficients), strict=True)))
    assert best is not None  # a single power of positive values has a positive coefficient
    found = best[1]
    return Curve(found.get(0, 0.0), found.get(1, 0.0), found.get(2, 0.0))


class TimeModel:
    """Predicts the seconds of a round from the steps observed so far."""

    def __init__(self) -> None:
        # Seconds by step, batch size and tokens.
        self._seen: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)

    def observe(self, step: str, batch_size: int, tokens: int, seconds: float) -> None:
        self._seen[step, batch_size].append((tokens, seconds))

    @property
    def prefill(self) -> Curve | None:
        """The curve of a single prefill; None before the first one was observed."""
        return self._curve(PREFILL, 1) if (PREFILL, 1) in self._seen else None

    def predict(self, round_: Round, tokens: int) -> float:
        """Seconds of a round with a prefix of `tokens`. A step that was never observed counts as nothing."""
        batch = round_.batch_size
        total = 0.0
        for state in round_.states:
            total += self._step(state, batch, tokens)
            if state == State.COLD:
                total += self._step(PREFILL, batch, tokens)
            elif round_.isolation == Isolation.STRICT:
                total += self._step(PREFILL, batch, tokens) + self._step(PRIME, batch, tokens)
        if round_.isolation == Isolation.FORK and any(state != State.COLD for state in round_.states):
            total += self._step(PRIME, batch, tokens)
            if State.COLD not in round_.states:
                total += self._step(PREFILL, batch, tokens)
        return total

    def _step(self, step: str, batch: int, tokens: int) -> float:
        single = self._seen.get((step, 1))
        same = self._seen.get((step, batch))
        if single:
            curve = self._curve(step, 1)
            if same and batch > 1:
                return curve.at(tokens) * median(seconds / curve.at(size) for size, seconds in same)
            # Not seen in a batch yet: as if the requests ran one after another.
            return curve.at(tokens) * batch
        return self._curve(step, batch).at(tokens) if same else 0.0

    def _curve(self, step: str, batch: int) -> Curve:
        return fit(self._seen[step, batch], (1, 2) if step == PREFILL else (0, 1))


@dataclass(slots=True)
class ContextTime:
    """Seconds of all rounds of one context: predicted at the start, predicted just before it, and actual."""

    context_tokens: int
    at_start_s: float
    refitted_s: float | None = None
    actual_s: float | None = None


@dataclass(slots=True)
class Predictions:
    """Predicted against actual run time, in seconds; set-up and measuring, without calibration and reports."""

    predicted_total_s: float
    calibration_s: float
    contexts: list[ContextTime]
    actual_total_s: float | None = None
    prefill: list[dict[str, float]] = field(default_factory=list)

    @property
    def error(self) -> float | None:
        """How far the first prediction was off, as a part of the actual time; positive if it was too high."""
        if not self.actual_total_s:
            return None
        return self.predicted_total_s / self.actual_total_s - 1

    def note_curve(self, after_tokens: int, curve: Curve) -> None:
        """Keeps the prefill curve as it was fitted after a context."""
        self.prefill.append({"after_context_tokens": after_tokens, **asdict(curve)})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error}


def _floats(values: NDArray[np.floating[Any]]) -> list[float]:
    return [float(value) for value in values]
