"""Decoding: a step of the model for each batch, and what is done with the tokens that it gives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from warmkv_server.contract.generation import Logprobs
from warmkv_server.engine.output.constraint import RanOut
from warmkv_server.engine.output.sampling import Choice
from warmkv_server.engine.steps.batch import Batch, feed_last
from warmkv_server.engine.steps.running_set import RunningSet
from warmkv_server.engine.steps.sequence import Sequence
from warmkv_server.engine.steps.speculate import Speculator


class Decoder:
    """Used on the MLX thread.

    Args:
        running_set: has the batches.
        max_rows: sequences of a batch.

    Attributes:
        speculator: guesses for a sequence that decodes alone, if that is wanted.
        decoded: tokens that were sampled and sent.
        rows: of the last step.
        stepped: when it began, on `time.perf_counter`, or when there was somebody to step for.
    """

    def __init__(self, running_set: RunningSet, max_rows: int) -> None:
        self._running = running_set
        self._max_rows = max_rows
        self.speculator: Speculator | None = None
        self.decoded = self.rows = 0
        self.stepped = 0.0

    def begin(self, sequence: Sequence) -> None:
        """Send the first token of a sequence, which is pending, and have it decode with others of its length.

        Or the next token, of one that gave way to others and comes back.
        """
        self._emit(sequence, *sequence.sampled())
        sequence.sent = True
        self._running.flush()
        if sequence.finish is not None:
            feed_last(sequence)
            sequence.keep_snapshot(sequence.loaded.cache_map.snapshot(sequence.caches))
            self._running.finish(sequence)
            return
        batch = self._batch_for([sequence]) or Batch()
        if not self._running.batches:
            self.stepped = time.perf_counter()  # nobody has waited for a step before
        with self._running.containing(sequence, *batch.sequences):
            batch.join(sequence)
            if batch not in self._running.batches:
                self._running.batches.append(batch)

    def begin_together(self, batch: Batch, choices: list[Choice | Exception]) -> None:
        """Send the first tokens of a new batch, and have it decode with others of its length.

        Args:
            choices: as `Batch.prefill` gave them.
        """
        self._take(batch, choices)
        failed: list[Sequence] = []
        for sequence in batch.sequences:
            sampled = sequence.sampled()
            with self._failing_alone(sequence, failed):
                self._emit(sequence, *sampled)
                sequence.sent = True
        self._running.flush()
        if failed:
            batch.leave(failed)
        if not batch.sequences:
            return
        if not self._running.batches:
            self.stepped = time.perf_counter()
        other = self._batch_for(batch.sequences)
        if other is None:
            self._running.batches.append(batch)
            return
        with self._running.containing(*other.sequences, *batch.sequences):
            other.absorb(batch)

    def _batch_for(self, sequences: list[Sequence]) -> Batch | None:
        return next((batch for batch in self._running.batches if batch.fits(sequences, self._max_rows)), None)

    def step(self) -> None:
        """Give each sequence a token, or one that is alone several."""
        self.stepped = time.perf_counter()
        if self.speculator is not None and self._speculate(self.speculator):
            return
        launched = []
        self.rows = sum(len(batch.sequences) for batch in self._running.batches)
        for batch in list(self._running.batches):
            with self._running.containing(*batch.sequences):
                launched.append((batch, batch.launch(self._running.flush_soon)))
        for batch, choices in launched:
            with self._running.containing(*batch.sequences):
                self._take(batch, choices)
        self._running.drop_empty_batches()

    def release(self, *sequences: Sequence) -> None:
        """Let them leave their batches, as far as they are in any, between two steps; their KV is their own then."""
        for batch in list(self._running.batches):
            leaving = [row for row in batch.sequences if row in sequences]
            if leaving:
                with self._running.containing(*batch.sequences):
                    for sequence in leaving:
                        batch.snapshot(sequence)
                    batch.leave(leaving)
        self._running.drop_empty_batches()

    def _take(self, batch: Batch, choices: list[Choice | Exception]) -> None:
        """Send the tokens that the last step gave, now that the next one is under way; let go of rows that end."""
        leaving: list[Sequence] = []
        failed: list[Sequence] = []
        for sequence, choice in zip(batch.sequences, choices, strict=True):
            sampled = None if sequence.sent else sequence.sampled()
            with self._failing_alone(sequence, failed):
                if sampled is not None:
                    self._emit(sequence, *sampled)
                if sequence.finish is None and isinstance(choice, RanOut):
                    sequence.run_out(choice)
                if sequence.finish is None and isinstance(choice, Exception):
                    raise choice
            if sequence in failed:
                continue
            sequence.pending, sequence.sent = choice if isinstance(choice, Choice) else None, False
            if sequence.finish is not None:
                batch.snapshot(sequence)
                leaving.append(sequence)
        if leaving or failed:
            self._running.flush()
            batch.leave([*leaving, *failed])
        for sequence in leaving:
            with self._running.containing(sequence):
                self._running.finish(sequence)

    @contextmanager
    def _failing_alone(self, sequence: Sequence, failed: list[Sequence]) -> Iterator[None]:
        """Let an exception of a row's own text or sampling end that row: the others' step went well.

        Args:
            failed: it is added to these.
        """
        try:
            yield
        except Exception:
            self._running.fail([sequence])
            failed.append(sequence)

    def _speculate(self, speculator: Speculator) -> bool:
        """Let a sequence that decodes alone take a guess in one step. False if there was none, and no step."""
        if len(self._running.batches) != 1 or len(self._running.batches[0].sequences) != 1:
            return False
        batch, sequence = self._running.batches[0], self._running.batches[0].sequences[0]
        if not speculator.limit and sequence.constraint is None:
            return False
        with self._running.containing(sequence):
            proposal = speculator.propose(sequence)
            guess = proposal.tokens
            if not guess:
                return False
            self.rows = 1
            choices = batch.verify(guess, proposal.masks)
            if not sequence.sent:
                self._emit(sequence, *sequence.sampled())
            self._running.flush()
            right = 0
            while sequence.finish is None and right < len(guess) and choices[right].read() == guess[right]:
                choices[right].check()
                self._emit(sequence, guess[right], choices[right].logprobs())
                right += 1
            batch.cut(len(guess) - right)
            speculator.learn(sequence, proposal, right)
            choices[right].read()
            sequence.pending, sequence.sent = choices[right], False
            if sequence.finish is not None:
                self._running.flush()
                batch.leave([sequence])
                self._running.finish(sequence)
        self._running.drop_empty_batches()
        return True

    def _emit(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> None:
        delta = sequence.emit(token, logprobs)
        self.decoded += 1
        self._running.send(sequence.ident, delta)
