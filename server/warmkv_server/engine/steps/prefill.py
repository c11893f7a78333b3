"""Chunked prefill: whose chunk comes next, how long it may be, and what follows when a prompt is computed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from warmkv_server.contract.generation import Progress
from warmkv_server.engine.output.constraint import RanOut
from warmkv_server.engine.steps.batch import Batch, choose_first, run_chunk, score_chunk
from warmkv_server.engine.steps.decode import Decoder
from warmkv_server.engine.steps.running_set import RunningSet, ran_out
from warmkv_server.engine.steps.sequence import Sequence

log = logging.getLogger(__name__)

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


class Prefiller:
    """Used on the MLX thread.

    Args:
        running_set: has the schedule.
        decoder: takes sequences over whose prompts are computed.
        short_prompt: tokens of new agents' prompts up to which several are prefilled in one chunk; 0 for none.

    Attributes:
        pace: how many tokens a chunk may have.
        prefilled: tokens that were computed.
    """

    def __init__(self, running_set: RunningSet, decoder: Decoder, pace: Pace, short_prompt: int) -> None:
        self._running = running_set
        self._decoder = decoder
        self.pace = pace
        self._short_prompt = short_prompt
        self.prefilled = 0
        self._took = 0.0
        self._waits = False
        self._ahead: dict[str, float] = {}
        self._planned: set[tuple[int, int]] = set()

    def lets_decode(self) -> bool:
        """Whether a step of decoding comes before the next chunk.

        Not while somebody is one chunk away from a first token and those who decode can wait for it: short prefills
        run one after the other, and sequences of one length that came together decode together, without padding.
        """
        chunk = self.pace.chunk
        if self._waits or not any(waiting.left <= chunk for waiting in self._running.schedule.prefilling):
            return True
        return time.perf_counter() - self._decoder.stepped + self._took > self.pace.gap

    def step(self) -> None:
        """Run one chunk, of one sequence or of several, if anybody's prompt isn't computed."""
        sequence = self._running.schedule.pick(self._is_ahead)
        self._waits = sequence is None
        if sequence is None:
            return
        began = time.perf_counter()
        mates = self._mates(sequence) if self._short_prompt else [sequence]
        if len(mates) == 1:
            self._run_one(sequence)
        else:
            self._run_together(mates)
        self._took = time.perf_counter() - began
        for tenant in {mate.tenant for mate in mates}:
            if self._running.decodes_beside(tenant):
                self._ahead[tenant] = self._ahead.get(tenant, 0.0) + self._took

    def decoded(self, seconds: float) -> None:
        """A step of decoding took so long: what chunks of other tenants than those who decode have had before."""
        for tenant, ahead in list(self._ahead.items()):
            if ahead > seconds and self._running.decodes_beside(tenant):
                self._ahead[tenant] = ahead - seconds
            else:
                del self._ahead[tenant]

    def _is_ahead(self, tenant: str) -> bool:
        """Whether its chunks have had more time than others' decoding since then: each has half."""
        return tenant in self._ahead and self._running.decodes_beside(tenant)

    def _mates(self, sequence: Sequence) -> list[Sequence]:
        tokens = self.pace.tokens(sequence.prefill_end, decoding=bool(self._running.batches))
        return self._running.schedule.mates(sequence, self._running.admitted(), self._short_prompt, tokens)

    def _run_one(self, sequence: Sequence) -> None:
        with self._running.containing(sequence):
            if sequence.opening is not None and not self._open(sequence, sequence.opening):
                return
            before = sequence.done
            self._run_chunk(sequence)
            if sequence.done >= sequence.prefill_end:
                self._running.schedule.prefilling.remove(sequence)
                if not sequence.wants_token:
                    self.prefilled += sequence.done - before
                    self._running.finish(sequence)
                    return
                if sequence.pending is None:
                    try:
                        choose_first(sequence)
                    except RanOut as error:
                        sequence.run_out(error)
                        self._running.finish(sequence)
                        return
            self.prefilled += sequence.done - before
            self._report(sequence)
            if sequence.pending is not None:
                self._decoder.begin(sequence)

    def _run_together(self, mates: list[Sequence]) -> None:
        """Run the only chunk of these. If it fails, whosever fault that is, each is prefilled alone."""
        for sequence in mates:
            if sequence.opening is not None:
                with self._running.containing(sequence):
                    self._open(sequence, sequence.opening)
        if any(sequence.opening is not None for sequence in mates):
            return  # one that can't begin; the others wait
        with self._running.containing(*mates):
            batch = Batch()
            for sequence in mates:
                batch.join(sequence)
            try:
                choices = batch.prefill(self._running.flush_soon)
            except Exception as error:
                if ran_out(error):
                    raise
                log.warning("%d prompts can't be prefilled together (%s)", len(mates), type(error).__name__)
                for sequence in mates:
                    sequence.begin_apart()
                return
            for sequence in mates:
                self.prefilled += sequence.done
                self._running.schedule.prefilling.remove(sequence)
                self._report(sequence)
            self._decoder.begin_together(batch, choices)

    def _open(self, sequence: Sequence, steps: Iterator[None]) -> bool:
        """Go on putting the reused prefix in place; at most for the gap while others decode. Whether it is done."""
        began = time.perf_counter()
        for _ in steps:
            if self._running.batches and time.perf_counter() - began > self.pace.gap / 2:
                return False
        sequence.opening = None
        self._report(sequence)
        return True

    def _report(self, sequence: Sequence) -> None:
        """Tell how far the prompt is, where it is farther than before."""
        done = min(sequence.done, sequence.prompt_length)
        if done > sequence.reported:
            sequence.reported = done
            self._running.send(sequence.ident, Progress(done, sequence.prompt_length))

    def _run_chunk(self, sequence: Sequence) -> None:
        prefix, began = sequence.done, time.perf_counter()
        tokens = self.pace.tokens(prefix, decoding=bool(self._running.batches))
        if sequence.job.score is None:
            run_chunk(sequence, tokens)
        elif sequence.done < sequence.prefill_end:
            if (scored := score_chunk(sequence, tokens)) is not None:
                self._running.send(sequence.ident, scored)
            return  # which is another pace
        if sequence.done > prefix and not self._is_new_shape(sequence, prefix):
            self.pace.record(sequence.done - prefix, prefix, time.perf_counter() - began)

    def _is_new_shape(self, sequence: Sequence, prefix: int) -> bool:
        """Whether attention was planned for the chunk behind this prefix: what that took says nothing of the next."""
        shapes = sequence.loaded.cache_map.shapes
        if shapes is None or (shape := shapes.chunk(prefix, sequence.done)) in self._planned:
            return False
        self._planned.add(shape)
        return True
