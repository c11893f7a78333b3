"""How many tokens a prefill chunk may have so that sequences that decode meanwhile don't stall."""

from __future__ import annotations

from dataclasses import dataclass, field

_FORGET = 0.9

_IN_TIME = 0.99
"""Share of the chunks that are to keep within the gap."""

_ADJUST = 0.05
"""How much one chunk moves the margin."""

_MARGINS = 1.0, 3.0


@dataclass
class Pace:
    """A running estimate of the time of a chunk of c tokens after a prefix of p: c * (a + b * p) seconds.

    A chunk of fewer tokens than `smallest` takes as long as one of so many. The estimate is least squares over the
    chunks run so far, older ones counting less. Times spread around it, so chunks are planned with a margin: it grows
    whenever a chunk took longer than estimate and margin, and shrinks otherwise, in steps that balance where 1% of the
    chunks take longer (Robbins and Monro's estimate of a quantile).

    Attributes:
        chunk: tokens of a chunk when nobody decodes.
        gap: seconds that a chunk may take when somebody does.
        smallest: below this a chunk costs about as much as a decode step, and halving it gains nothing.
    """

    chunk: int
    gap: float
    smallest: int = 16
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    _margin: float = 1.2

    def record(self, tokens: int, prefix: int, seconds: float) -> None:
        """Learn from one chunk."""
        if expected := self.predict(tokens, prefix):
            step = _IN_TIME if seconds > expected * self._margin else _IN_TIME - 1
            self._margin = min(max(self._margin * (1 + _ADJUST * step), _MARGINS[0]), _MARGINS[1])
        rate = seconds / max(tokens, self.smallest)
        new = (1.0, prefix, prefix * prefix, rate, prefix * rate)
        self._sums = [_FORGET * old + value for old, value in zip(self._sums, new, strict=True)]

    def predict(self, tokens: int, prefix: int) -> float:
        """Seconds that a chunk will take; 0 before any was run."""
        n, sum_p, sum_pp, sum_r, sum_pr = self._sums
        if not n:
            return 0.0
        spread = n * sum_pp - sum_p * sum_p
        slope = max(0.0, (n * sum_pr - sum_p * sum_r) / spread) if spread > n else 0.0
        return max(tokens, self.smallest) * max(0.0, sum_r / n + slope * (prefix - sum_p / n))

    def tokens(self, prefix: int, decoding: bool) -> int:
        """Tokens of the next chunk: `chunk` halved until it fits the gap, margin included.

        Alone, a sequence always gets the same chunks, so its rounding doesn't depend on how fast the machine is.
        """
        tokens = self.chunk
        while decoding and tokens > self.smallest and self.predict(tokens, prefix) * self._margin > self.gap:
            tokens //= 2
        return tokens
