"""Continuous batching: steps of one sequence that computes by itself, and of several that decode together.

Each is planned from lengths and tokens alone, and then run: what is fed and how far attention reads is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from warmkv_server.contract.generation import Scored
from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.model.step_plan import Row, StepKind, StepPlan, Wanted
from warmkv_server.engine.output.constraint import Mask
from warmkv_server.engine.output.sampling import Choice, Scores, constrained
from warmkv_server.engine.output.scoring import score, scored_at_once
from warmkv_server.engine.steps.sequence import Sequence, first_tokens

PADDING = 0.25
"""The largest share of a batch's rows times length that may be padding."""


@dataclass(eq=False)
class Batch:
    """Rows of one dense batch. A lone sequence keeps its own caches and pays for no padding or mask."""

    sequences: list[Sequence] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)
    _joining: list[Sequence] = field(default_factory=list)
    """The last of `sequences`, whose caches are still their own."""
    _batched: bool = False
    _steps: int = 0

    def fits(self, joining: Sequences[Sequence], max_rows: int) -> bool:
        """Whether these can join and the batch stays within its rows and its padding."""
        rows = [*self.sequences, *joining]
        if not self.sequences:
            return True
        if len(rows) > max_rows or not all(kinds.can_batch(sequence.caches) for sequence in joining):
            return False
        return little_padding([row.done for row in rows])

    def join(self, sequence: Sequence) -> None:
        """Take a sequence over, with its caches and its first token, not yet fed. Nothing is quantised again.

        Caches are put together with the next step, so that those who come together are copied once.
        """
        self._joining.append(sequence)
        self.sequences.append(sequence)
        if len(self.sequences) == 1:
            self._settle()

    def absorb(self, other: Batch) -> None:
        """Take over all rows of another batch that has just begun."""
        for batch in (self, other):
            batch.drain()
            if not batch._batched:
                batch.caches, batch._batched = _merged([batch.caches]), True
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.extend(theirs)
        self.sequences += other.sequences
        self._note_lengths()

    def prefill(self, meanwhile: Callable[[], None]) -> list[Choice | Exception]:
        """Compute what is left of every row's prompt in one chunk, and start choosing first tokens, as `launch` does.

        For models all of whose caches can be cut: rows with fewer tokens left are padded behind their end.
        """
        self._settle()
        loaded = self.sequences[0].loaded
        plan = plan_chunk(self.sequences, [row.prefill_end for row in self.sequences])
        counts = [row.length for row in plan.rows]
        if most := max(counts):
            loaded.runner.prefill(plan, self.caches)
            for leaf in kinds.token_leaves(self.caches).values():
                leaf.prepare(right_padding=[most - count for count in counts])
                leaf.finalize()
            pieces = loaded.cache_map.drain(self.caches, len(self.sequences))
            words = [first_tokens(piece, count) for piece, count in zip(pieces, counts, strict=True)]
            mx.eval(kinds.arrays(self.caches), [list(tensors.values()) for row in words for tensors in row.values()])
            for row, grown in zip(self.sequences, words, strict=True):
                if row.done < row.prefill_end:
                    row.add_grown(grown)
                    row.done = row.prefill_end
            self._note_lengths()
        for row in self.sequences:
            row.pending, row.sent = Choice(mx.array([row.to_prefill[-1]])), True
        return self.launch(meanwhile)

    def _settle(self) -> None:
        """Put the caches of those who joined to the others'."""
        if not self._joining:
            return
        joining, self._joining = self._joining, []
        own = [sequence.caches for sequence in joining]
        for sequence in joining:
            sequence.caches = []
        before = len(self.sequences) - len(joining)
        if before:
            self._drain(self.sequences[:before])
        if self._batched:
            for mine, other in zip(self.caches, _merged(own), strict=True):
                mine.extend(other)
        elif len(self.sequences) == 1:
            self.caches = own[0]
        else:
            self.caches, self._batched = _merged([self.caches, *own] if before else own), True
        self._note_lengths()

    def leave(self, leaving: list[Sequence]) -> None:
        """Let finished or cancelled sequences go, with their words; `snapshot` first, if recurrent state is wanted."""
        self.drain()
        keep = [row for row, sequence in enumerate(self.sequences) if sequence not in leaving]
        self.sequences = [self.sequences[row] for row in keep]
        if not keep:
            self.caches, self._batched = [], False
        elif self._batched:
            for cache in self.caches:
                cache.filter(mx.array(keep))
            self._note_lengths()

    def launch(self, meanwhile: Callable[[], None]) -> list[Choice | Exception]:
        """Feed each row's last token and start computing its next one.

        Args:
            meanwhile: called when the step is described and about to be computed. What it wakes in other threads runs
                while this one waits without Python's lock, instead of holding up the description.

        Returns the choices that are being computed, or why a row can't choose. Their tokens are lazy; the KV of the
        fed tokens is being computed.
        """
        self._settle()
        tokens = [row.to_feed for row in self.sequences]
        chosen = tokens[0] if len(tokens) == 1 else mx.concatenate(tokens)
        logits = self.sequences[0].loaded.runner.decode(plan_step(self.sequences), self.caches, chosen)
        choices = self._choose(logits, tokens)
        meanwhile()
        mx.async_eval([choice.arrays for choice in choices if isinstance(choice, Choice)])
        for sequence in self.sequences:
            sequence.done += 1
        self._count_step()
        return choices

    def verify(self, guess: list[int], masks: list[Mask | None] | None = None) -> list[Choice]:
        """Feed the only row's last token and a guess of what follows it, and start choosing a token behind each.

        What turns out to be wrong is for `cut`, before anything else is done with the batch.

        Args:
            masks: of what may be chosen behind each; None for everything.
        """
        (sequence,) = self.sequences
        assert sequence.pending is not None
        assert sequence.chooser is not None
        plan = plan_check(sequence, [sequence.pending.read(), *guess])
        logits = sequence.loaded.runner.verify(plan, self.caches)
        choices = sequence.chooser.choose_each(logits, sequence.done + 1, masks)
        mx.async_eval([choice.arrays for choice in choices])
        sequence.done += 1 + len(guess)
        return choices

    def cut(self, tokens: int) -> None:
        """Take back the last tokens that `verify` fed, in caches and logged words; none is fine."""
        if tokens:
            for leaf in kinds.token_leaves(self.caches).values():
                leaf.cut(tokens)
            self.sequences[0].done -= tokens
        self._count_step()

    def drain(self) -> None:
        """Hand the words logged since the last time to the rows they belong to."""
        self._settle()
        self._drain(self.sequences)

    def _drain(self, rows: list[Sequence]) -> None:
        if any(leaf.log for leaf in kinds.leaves(self.caches)):
            pieces = rows[0].loaded.cache_map.drain(self.caches, len(rows))
            for sequence, tensors in zip(rows, pieces, strict=True):
                sequence.add_grown(tensors)
            mx.async_eval([list(tensors.values()) for piece in pieces for tensors in piece.values()])

    def snapshot(self, sequence: Sequence) -> None:
        """Keep the row's recurrent state as it is now."""
        self._settle()
        row = self.sequences.index(sequence)
        sequence.keep_snapshot(sequence.loaded.cache_map.snapshot(self.caches, row))

    def _count_step(self) -> None:
        self._steps += 1
        if self._steps % kinds.DRAIN_EVERY == 0:
            self.drain()

    def _note_lengths(self) -> None:
        even = len({sequence.done for sequence in self.sequences}) == 1
        for leaf in kinds.leaves(self.caches):
            leaf.even = even

    def _choose(self, logits: mx.array, fed: list[mx.array]) -> list[Choice | Exception]:
        if all(row.constraint is None for row in self.sequences):
            return self._choose_from(logits, fed, None)
        mx.async_eval(logits)  # computed while the masks are: those wait for the tokens of the step before
        masks: list[Mask | None] = []
        broken: dict[int, Exception] = {}
        for number, row in enumerate(self.sequences):
            try:
                masks.append(row.mask())
            except Exception as error:
                masks.append(None)
                broken[number] = error
        choices = self._choose_from(logits, fed, masks)
        return [broken.get(number, choice) for number, choice in enumerate(choices)]

    def _choose_from(
        self, logits: mx.array, fed: list[mx.array], masks: list[Mask | None] | None
    ) -> list[Choice | Exception]:
        if all(row.chooser is not None and row.chooser.plain for row in self.sequences):
            logits = constrained(self.sequences[0].loaded.choosable(logits), masks)
            best = mx.argmax(logits, axis=-1)
            scores = Scores.of(logits, best)
            if len(self.sequences) == 1:
                return [Choice(best, scores)]
            # Another type, so that each row's token has memory of its own. On CUDA at most 8 bytes are shared with the
            # host; a larger array would move to and fro with every step, because the host reads it.
            return [Choice(best[row : row + 1].astype(mx.int64), scores, row) for row in range(len(self.sequences))]
        choices: list[Choice | Exception] = []
        for row, sequence in enumerate(self.sequences):
            assert sequence.chooser is not None
            try:
                last = fed[row] if sequence.completion else None  # of the answer
                mask = masks[row] if masks is not None else None
                choices.append(sequence.chooser.choose(logits[row : row + 1], sequence.done + 1, last, mask))
            except Exception as error:  # this row's alone: the step itself went well
                choices.append(error)
        return choices


def little_padding(lengths: Sequences[int]) -> bool:
    """Whether a batch of rows of these lengths has no more padding than a batch may have."""
    longest = max(lengths)
    return sum(longest - length for length in lengths) <= PADDING * longest * len(lengths)


def _merged(rows: list[list[Any]]) -> list[Any]:
    return [type(layer[0]).merge(list(layer)) for layer in zip(*rows, strict=True)]


def next_boundary(sequence: Sequence, chunk: int) -> int:
    """Where the next chunk ends.

    Chunks end at multiples of `chunk`, which is a multiple of the block size, at the lengths where a snapshot is
    wanted, and at the end: never at a place that depends on where the reused prefix came from.
    """
    end = min((sequence.done // chunk + 1) * chunk, sequence.prefill_end)
    wanted = [length for length in sequence.job.snapshot_at if sequence.done < length < end]
    return min([end, *wanted])


def plan_chunk(sequences: Sequences[Sequence], ends: Sequences[int], wanted: Wanted = Wanted.NOTHING) -> StepPlan:
    """To compute each prompt up to its end, in one chunk. Rows of several begin at one place."""
    rows = tuple(
        [
            Row(sequence.ident, sequence.done, tuple(sequence.to_prefill[sequence.done : end]))
            for sequence, end in zip(sequences, ends, strict=True)
        ]
    )
    start, end = rows[0].start, max(ends)
    shapes = sequences[0].loaded.cache_map.shapes
    fed, read = (end - start, end) if shapes is None or end == start else shapes.chunk(start, end)
    return StepPlan(StepKind.PREFILL, rows, fed, read, wanted)


def plan_step(sequences: Sequences[Sequence]) -> StepPlan:
    """To feed each row the token that was chosen for it last, and choose the next one."""
    rows = tuple([Row(sequence.ident, sequence.done) for sequence in sequences])
    shapes = sequences[0].loaded.cache_map.shapes
    lengths = [row.start for row in rows]
    fed, read = (1, max(lengths) + 1) if shapes is None else shapes.decoding(lengths)
    return StepPlan(StepKind.DECODE, rows, fed, read, Wanted.LOGITS)


def plan_check(sequence: Sequence, tokens: Sequences[int]) -> StepPlan:
    """To feed a row its last token and a guess, and choose a token behind each."""
    row = Row(sequence.ident, sequence.done, tuple(tokens))
    shapes = sequence.loaded.cache_map.shapes
    end = row.start + row.length
    return StepPlan(StepKind.VERIFY, (row,), row.length, end if shapes is None else shapes.length(end), Wanted.LOGITS)


def plan_token(sequence: Sequence, token: int, wanted: Wanted) -> StepPlan:
    """To feed a row this token."""
    row = Row(sequence.ident, sequence.done, (token,))
    return StepPlan(StepKind.DECODE, (row,), 1, row.start + 1, wanted)


def run_chunk(sequence: Sequence, chunk: int) -> None:
    """Compute one chunk of a sequence that has its own caches."""
    end = next_boundary(sequence, chunk)
    if end > sequence.done:
        sequence.loaded.runner.prefill(plan_chunk([sequence], [end]), sequence.caches)
        mx.eval(kinds.arrays(sequence.caches))
        sequence.done = end
        sequence.collect()
        if end == sequence.prefill_end or end in sequence.job.snapshot_at:
            sequence.keep_snapshot(sequence.loaded.cache_map.snapshot(sequence.caches))


def score_chunk(sequence: Sequence, chunk: int) -> Scored | None:
    """As `run_chunk`, and tell the log probabilities of the tokens that follow; None if none of them is asked for."""
    job, start = sequence.job, sequence.done
    assert job.score is not None
    end = next_boundary(sequence, min(chunk, scored_at_once(sequence.loaded.info.vocab_size)))
    logits = sequence.loaded.runner.score(plan_chunk([sequence], [end], Wanted.LOGITS), sequence.caches)
    first = max(start, job.score.first - 1, sequence.scored)
    scored = None
    if first < end:
        targets = np.asarray(job.tokens[first + 1 : end + 1], np.int32)
        scored = score(sequence.loaded.choosable(logits[first - start :]), targets, job.score.top)
    mx.eval(kinds.arrays(sequence.caches))
    sequence.done = end
    sequence.scored = max(sequence.scored, end)
    sequence.collect()
    return scored


def choose_first(sequence: Sequence) -> None:
    """Feed the last token, alone, and sample the first token of the answer, or the next one, from its logits."""
    assert sequence.chooser is not None
    last = sequence.to_prefill[-1]
    logits = sequence.loaded.runner.decode(plan_token(sequence, last, Wanted.LOGITS), sequence.caches)
    sequence.done += 1
    fed = mx.array([last]) if sequence.completion else None
    sequence.pending = sequence.chooser.choose(logits, sequence.done, fed, sequence.mask())
    mx.eval(sequence.pending.arrays)
    sequence.collect()


def feed_last(sequence: Sequence) -> None:
    """Compute the KV of the last token of the answer."""
    sequence.loaded.runner.prefill(plan_token(sequence, sequence.completion[-1], Wanted.NOTHING), sequence.caches)
    sequence.done += 1
    mx.eval(kinds.arrays(sequence.caches))
    sequence.collect()
