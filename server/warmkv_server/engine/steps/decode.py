"""Decoding: a step of the model for each group, and what is done with the tokens that it gives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from warmkv_server.contract.generation import Logprobs
from warmkv_server.engine.output.sampling import Choice
from warmkv_server.engine.steps.batch import Group, feed_last
from warmkv_server.engine.steps.running_set import Roster
from warmkv_server.engine.steps.sequence import Sequence
from warmkv_server.engine.steps.speculate import Speculator


class Decoder:
    """Used on the MLX thread.

    Args:
        roster: has the groups.
        max_rows: sequences of a group.

    Attributes:
        speculator: guesses for a sequence that decodes alone, if that is wanted.
        decoded: tokens that were sampled and sent.
        rows: of the last step.
        stepped: when it began, on `time.perf_counter`, or when there was somebody to step for.
    """

    def __init__(self, roster: Roster, max_rows: int) -> None:
        self._roster = roster
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
        self._roster.flush()
        if sequence.finish is not None:
            feed_last(sequence)
            sequence.keep_snapshot(sequence.loaded.cache_map.snapshot(sequence.caches))
            self._roster.finish(sequence)
            return
        group = self._group_for([sequence]) or Group()
        if not self._roster.groups:
            self.stepped = time.perf_counter()  # nobody has waited for a step before
        with self._roster.containing(sequence, *group.sequences):
            group.join(sequence)
            if group not in self._roster.groups:
                self._roster.groups.append(group)

    def begin_together(self, group: Group, choices: list[Choice | Exception]) -> None:
        """Send the first tokens of a new group, and have it decode with others of its length.

        Args:
            choices: as `Group.prefill` gave them.
        """
        self._take(group, choices)
        failed: list[Sequence] = []
        for sequence in group.sequences:
            sampled = sequence.sampled()
            with self._failing_alone(sequence, failed):
                self._emit(sequence, *sampled)
                sequence.sent = True
        self._roster.flush()
        if failed:
            group.leave(failed)
        if not group.sequences:
            return
        if not self._roster.groups:
            self.stepped = time.perf_counter()
        other = self._group_for(group.sequences)
        if other is None:
            self._roster.groups.append(group)
            return
        with self._roster.containing(*other.sequences, *group.sequences):
            other.absorb(group)

    def _group_for(self, sequences: list[Sequence]) -> Group | None:
        return next((group for group in self._roster.groups if group.fits(sequences, self._max_rows)), None)

    def step(self) -> None:
        """Give each sequence a token, or one that is alone several."""
        self.stepped = time.perf_counter()
        if self.speculator is not None and self._speculate(self.speculator):
            return
        launched = []
        self.rows = sum(len(group.sequences) for group in self._roster.groups)
        for group in list(self._roster.groups):
            with self._roster.containing(*group.sequences):
                launched.append((group, group.launch(self._roster.flush_soon)))
        for group, choices in launched:
            with self._roster.containing(*group.sequences):
                self._take(group, choices)
        self._roster.drop_empty_groups()

    def release(self, *sequences: Sequence) -> None:
        """Let them leave their groups, as far as they are in any, between two steps; their KV is their own then."""
        for group in list(self._roster.groups):
            leaving = [row for row in group.sequences if row in sequences]
            if leaving:
                with self._roster.containing(*group.sequences):
                    for sequence in leaving:
                        group.snapshot(sequence)
                    group.leave(leaving)
        self._roster.drop_empty_groups()

    def _take(self, group: Group, choices: list[Choice | Exception]) -> None:
        """Send the tokens that the last step gave, now that the next one is under way; let go of rows that end."""
        leaving: list[Sequence] = []
        failed: list[Sequence] = []
        for sequence, choice in zip(group.sequences, choices, strict=True):
            sampled = None if sequence.sent else sequence.sampled()
            with self._failing_alone(sequence, failed):
                if sampled is not None:
                    self._emit(sequence, *sampled)
                if sequence.finish is None and isinstance(choice, Exception):
                    raise choice
            if sequence in failed:
                continue
            sequence.pending, sequence.sent = choice if isinstance(choice, Choice) else None, False
            if sequence.finish is not None:
                group.snapshot(sequence)
                leaving.append(sequence)
        if leaving or failed:
            self._roster.flush()
            group.leave([*leaving, *failed])
        for sequence in leaving:
            with self._roster.containing(sequence):
                self._roster.finish(sequence)

    @contextmanager
    def _failing_alone(self, sequence: Sequence, failed: list[Sequence]) -> Iterator[None]:
        """Let an exception of a row's own text or sampling end that row: the others' step went well.

        Args:
            failed: it is added to these.
        """
        try:
            yield
        except Exception:
            self._roster.fail([sequence])
            failed.append(sequence)

    def _speculate(self, speculator: Speculator) -> bool:
        """Let a sequence that decodes alone take a guess in one step. False if there was none, and no step."""
        if len(self._roster.groups) != 1 or len(self._roster.groups[0].sequences) != 1:
            return False
        group, sequence = self._roster.groups[0], self._roster.groups[0].sequences[0]
        with self._roster.containing(sequence):
            guess = speculator.propose(sequence)
            if not guess:
                return False
            self.rows = 1
            choices = group.verify(guess)
            if not sequence.sent:
                self._emit(sequence, *sequence.sampled())
            self._roster.flush()
            right = 0
            while sequence.finish is None and right < len(guess) and choices[right].read() == guess[right]:
                choices[right].check()
                self._emit(sequence, guess[right], choices[right].logprobs())
                right += 1
            group.cut(len(guess) - right)
            speculator.learn(sequence, len(guess), right)
            choices[right].read()
            sequence.pending, sequence.sent = choices[right], False
            if sequence.finish is not None:
                self._roster.flush()
                group.leave([sequence])
                self._roster.finish(sequence)
        self._roster.drop_empty_groups()
        return True

    def _emit(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> None:
        delta = sequence.emit(token, logprobs)
        self.decoded += 1
        self._roster.send(sequence.ident, delta)
