"""Sequences that decode together: one step of the model gives each of them a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from warmkv_server.engine import caches as kinds
from warmkv_server.engine.sampling import Choice
from warmkv_server.engine.sequence import Sequence

DRAIN_EVERY = 64
"""Steps after which logged words are gathered, so that the log doesn't grow with the answer."""

PADDING = 0.25
"""The largest share of a group's rows times length that may be padding."""


@dataclass(eq=False)
class Group:
    """Rows of one dense batch. A lone sequence keeps its own caches and pays for no padding or mask."""

    sequences: list[Sequence] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)
    _batched: bool = False
    _steps: int = 0

    def fits(self, sequence: Sequence, max_rows: int) -> bool:
        """Whether joining keeps the group within its rows and its padding."""
        if not self.sequences:
            return True
        if len(self.sequences) >= max_rows or not kinds.can_batch(sequence.caches):
            return False
        lengths = [row.done for row in self.sequences] + [sequence.done]
        longest = max(lengths)
        return sum(longest - length for length in lengths) <= PADDING * longest * len(lengths)

    def join(self, sequence: Sequence) -> None:
        """Take a sequence over, with its caches and its first token, not yet fed. Nothing is quantised again."""
        if not self.sequences:
            self.caches, self._batched = sequence.caches, False
        else:
            self.drain()
            if not self._batched:
                self.caches = _merged([self.caches])
                self._batched = True
            for mine, other in zip(self.caches, _merged([sequence.caches]), strict=True):
                mine.extend(other)
        sequence.caches = []
        self.sequences.append(sequence)

    def leave(self, leaving: list[Sequence]) -> None:
        """Let finished or cancelled sequences go; `collect` first, if their KV is wanted."""
        self.drain()
        keep = [row for row, sequence in enumerate(self.sequences) if sequence not in leaving]
        self.sequences = [self.sequences[row] for row in keep]
        if not keep:
            self.caches, self._batched = [], False
        elif self._batched:
            for cache in self.caches:
                cache.filter(mx.array(keep))

    def launch(self, meanwhile: Callable[[], None]) -> list[Choice | Exception]:
        """Feed each row's last token and start computing its next one.

        Args:
            meanwhile: called when the step is described and about to be computed. What it wakes in other threads runs
                while this one waits without Python's lock, instead of holding up the description.

        Returns the choices that are being computed, or why a row can't choose. Their tokens are lazy; the KV of the
        fed tokens is being computed.
        """
        tokens = [row.pending.token for row in self.sequences if row.pending is not None]
        inputs = tokens[0] if len(tokens) == 1 else mx.concatenate(tokens)
        logits = self.sequences[0].loaded.model(inputs[:, None], cache=self.caches)[:, -1]
        choices = self._choose(logits, tokens)
        meanwhile()
        mx.async_eval([choice.arrays for choice in choices if isinstance(choice, Choice)])
        for sequence in self.sequences:
            sequence.done += 1
        self._count_step()
        return choices

    def verify(self, guess: list[int]) -> list[Choice]:
        """Feed the only row's last token and a guess of what follows it, and start choosing a token behind each.

        What turns out to be wrong is for `cut`, before anything else is done with the group.
        """
        (sequence,) = self.sequences
        assert sequence.pending is not None
        assert sequence.chooser is not None
        inputs = mx.array([[sequence.pending.read(), *guess]])
        logits = sequence.loaded.model(inputs, cache=self.caches)[0]
        choices = sequence.chooser.choose_each(logits, sequence.done + 1)
        mx.async_eval([choice.arrays for choice in choices])
        sequence.done += 1 + len(guess)
        return choices

    def cut(self, tokens: int) -> None:
        """Take back the last tokens that `verify` fed, in caches and logged words; none is fine."""
        if tokens:
            for leaf in kinds.leaves(self.caches):
                leaf.cut(tokens)
            self.sequences[0].done -= tokens
        self._count_step()

    def drain(self) -> None:
        """Hand the words logged since the last time to the rows they belong to."""
        if any(getattr(leaf, "log", None) for leaf in kinds.leaves(self.caches)):
            cache_map = self.sequences[0].loaded.cache_map
            pieces = cache_map.drain(self.caches, len(self.sequences))
            for sequence, tensors in zip(self.sequences, pieces, strict=True):
                sequence.add_grown(tensors)
            mx.async_eval([list(tensors.values()) for piece in pieces for tensors in piece.values()])

    def snapshot(self, sequence: Sequence) -> None:
        """Keep the row's recurrent state as it is now."""
        row = self.sequences.index(sequence)
        sequence.keep_snapshot(sequence.loaded.cache_map.snapshot(self.caches, row))

    def _count_step(self) -> None:
        self._steps += 1
        if self._steps % DRAIN_EVERY == 0:
            self.drain()

    def _choose(self, logits: mx.array, fed: list[mx.array]) -> list[Choice | Exception]:
        if all(row.chooser is not None and row.chooser.plain for row in self.sequences):
            best = mx.argmax(logits, axis=-1)
            return [Choice(best[row : row + 1]) for row in range(len(self.sequences))]
        choices: list[Choice | Exception] = []
        for row, sequence in enumerate(self.sequences):
            assert sequence.chooser is not None
            try:
                choices.append(sequence.chooser.choose(logits[row : row + 1], sequence.done + 1, fed[row]))
            except Exception as error:  # this row's alone: the step itself went well
                choices.append(error)
        return choices


def _merged(rows: list[list[Any]]) -> list[Any]:
    return [type(layer[0]).merge(list(layer)) for layer in zip(*rows, strict=True)]
