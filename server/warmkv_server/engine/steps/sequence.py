"""One sequence on its way through the engine: its caches, its tokens, and the KV it has grown."""

from __future__ import annotations

import logging
import time
from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from warmkv_server.contract.generation import Delta, Finish, Finished, Job, Logprobs
from warmkv_server.contract.kv import TOKEN_AXIS, Growth, PartKind, Reuse, Span, Tensors, policy_of
from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.codecs.codec import join
from warmkv_server.engine.model.load import LoadedModel
from warmkv_server.engine.model.memory_need import MemoryNeed
from warmkv_server.engine.output.answer_text import AnswerText
from warmkv_server.engine.output.constraint import Constraint, Mask, RanOut
from warmkv_server.engine.output.sampling import Choice, Chooser

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Sequence:
    """State that only the MLX thread touches.

    Attributes:
        ident: the engine's number for it; the key of everything that is sent back.
        need: bytes it takes at most.
        caches: its own caches while it runs alone; empty once it shares a batch's.
        done: tokens of prompt and answer whose KV is computed.
        to_prefill: tokens to compute in chunks: the prompt, or after `rewind` also what was sent of the answer.
        completion: tokens of the answer that were sent out.
        finish: why it ends, once that is decided.
        pending: the token sampled last, to be fed next.
        opening: what is left to do before the first chunk.
        sent: whether the pending token was sent out already.
        rewound: whether it has begun again, after memory ran out.
        begun: whether it has left the queue before, and its client was told.
        parked: whether it gave way to another tenant's and holds words instead of caches, to go on from them.
        apart: whether it is prefilled alone, after a chunk failed that others had a part in.
        reported: tokens of the prompt that its client was told of.
        submitted: when it was sent, on `time.perf_counter`.
        came: when it left the queue last, on the same clock.
        constraint: what the answer's text may become; None for anything.
        scored: tokens behind which the log probabilities were told.
        forced: tokens of the answer that the constraint left no choice of, and that no step was spent on.
    """

    ident: int
    job: Job
    loaded: LoadedModel
    need: MemoryNeed
    caches: list[Any] = field(default_factory=list)
    done: int = 0
    completion: list[int] = field(default_factory=list)
    finish: Finish | None = None
    opening: Iterator[None] | None = None
    pending: Choice | None = None
    sent: bool = False
    rewound: bool = False
    begun: bool = False
    parked: bool = False
    apart: bool = False
    reported: int = -1
    submitted: float = 0.0
    came: float = 0.0
    constraint: Constraint | None = None
    forced: int = 0
    scored: int = 0
    chooser: Chooser | None = None
    text: AnswerText | None = None
    _grown: list[tuple[int, Mapping[PartKind, Tensors]]] = field(default_factory=list)
    _reuse: Reuse = field(init=False)
    _snapshots: dict[int, Tensors] = field(default_factory=dict)
    _opened: bool = False
    _began: float = field(default_factory=time.perf_counter)
    _first_token: float = 0.0

    def __post_init__(self) -> None:
        self.to_prefill: abc.Sequence[int] = self.job.tokens
        self._reuse = self.job.reuse
        if (prefix := self.job.prefix) is not None and prefix.count:
            self._grown, self._snapshots = [(prefix.count, prefix.tensors)], dict(prefix.snapshots)
            self._reuse = self._held(prefix.end)

    @property
    def prompt_length(self) -> int:
        return len(self.job.tokens)

    @property
    def tenant(self) -> str:
        return self.job.tenant

    @property
    def wants_token(self) -> bool:
        """Whether the last token of `to_prefill` is to be followed by one of the answer."""
        return self.job.answer is not None and self.finish is None

    @property
    def prefill_end(self) -> int:
        """Tokens to prefill in chunks: all, or all but the last, whose logits choose a token or are nobody's."""
        return len(self.to_prefill) - (self.wants_token or self.job.score is not None)

    @property
    def left(self) -> int:
        """Tokens to prefill in chunks that are neither computed nor reused."""
        return self.prefill_end - (self.done if self.opening is None else self._reuse.length)

    def open(self) -> Iterator[None]:
        """Take memory and put what is there already in place, in steps."""
        self.caches = self.loaded.cache_map.empty_caches(self.loaded.runner.model)
        job = self.job
        if self._reuse.length:
            yield from self.loaded.cache_map.fill(self.caches, self._reuse, room=self._room())
            self.done = self._reuse.length
        if self.parked:  # in the caches now
            self.parked, self._reuse = False, self.job.reuse
            if self.done != self.prefill_end and self.done not in job.snapshot_at:
                self._snapshots.pop(self.done, None)
        if self._opened:
            return
        self._opened, self._began = True, time.perf_counter()
        if job.answer is not None:
            info = self.loaded.info
            self.chooser = Chooser(
                job.answer.sampling, job.tokens, info.vocab_size, job.answer.top_logprobs, self.loaded.choosable
            )
            silent = info.eos_token_ids | job.answer.stop_tokens
            self.text = AnswerText(self.loaded.spelling, job.tokens[-64:], silent, job.answer.stop)

    def _room(self) -> int:
        """Tokens to make room for behind a reused prefix: the new prompt and a first stretch of the answer.

        Of few shapes, the capacity must be what it would be without reuse: what the next chunk needs, at most.
        """
        new = max(0, len(self.job.tokens) - self._reuse.length)
        if (shapes := self.loaded.cache_map.shapes) is not None:
            return min(new, shapes.step)
        left = self.job.answer.max_tokens - len(self.completion) if self.job.answer is not None else 0
        return new + min(left, 256)

    def rewind(self) -> None:
        """Drop everything but the words, after a step of it has failed: it can begin again from them.

        The tokens that were sent stay as they are; those whose words are lost are computed again. Where state can't be
        cut, that is everything behind the reused prefix.
        """
        self.rewound, self.parked = True, False
        self.caches, self.opening, self.pending, self.sent = [], None, None, False
        self.to_prefill = [*self.job.tokens, *self.completion]
        self._snapshots = {}
        spans, end = list(self.job.reuse.spans), self.job.reuse.length
        if self.loaded.cache_map.states:
            self._grown = []
        elif spans:
            spans[-1] = _cut(spans[-1], end)
        grown, self._grown = self._grown, []
        for count, parts in grown:
            # The last token is fed again for its logits. One that was fed but not sent will be chosen again.
            piece = _cut(Span(end, count, parts), min(end + count, self.prefill_end))
            if piece.count > 0:
                mx.eval([list(tensors.values()) for tensors in piece.parts.values()])
                spans.append(piece)
                self._grown.append((piece.count, piece.parts))
                end = piece.end
        self._reuse, self.done = Reuse(end, tuple(spans)), end
        if self.chooser is not None:
            self.chooser.rewind(self.completion)
        if self.constraint is not None:
            self.constraint.go_back(min(self.constraint.taken, len(self.completion)))

    @property
    def parked_bytes(self) -> int:
        """Bytes of what it holds while it is parked, or would hold: the words of what is computed, and states."""
        layout = self.loaded.cache_map.layout
        words = sum(layout.nbytes(policy.kind) for policy in layout.policies if not policy.snapshot)
        states = sum(layout.nbytes(kind) for kind in layout.snapshots) * (1 + len(self._snapshots))
        return words * max(0, self.done - self.job.reuse.length) + states

    def park(self) -> None:
        """Give its memory back but for the words, between two steps, to go on later where it is now.

        Nothing is chosen again: the pending token stays, and so does all that chooses and spells. It is in no batch;
        one that was has its snapshot.
        """
        if self.opening is None and self.caches:
            self.collect()
            if self.done not in self._snapshots:
                self.keep_snapshot(self.loaded.cache_map.snapshot(self.caches))
        self._reuse = self._held(self.done)
        if self.pending is not None:
            mx.eval(self.pending.arrays)
        self.parked, self.caches, self.opening = True, [], None

    def _held(self, done: int) -> Reuse:
        """What is reused and what was computed behind it, up to there, as a prefix that can be put in place."""
        reuse, end = self.job.reuse, self.job.reuse.length
        if done <= end:
            return reuse
        spans = list(reuse.spans)
        if spans:
            spans[-1] = _cut(spans[-1], end)
        for count, parts in self._grown:
            spans.append(Span(end, count, parts))
            end += count
        if self.loaded.cache_map.states:
            words = spans.pop() if self._grown else Span(end, done - end, {})
            spans.append(Span(words.start, words.count, {**words.parts, PartKind.STATE: self._snapshots[done]}))
            end = spans[-1].end
        assert end == done
        mx.eval([[list(tensors.values()) for tensors in span.parts.values()] for span in spans[len(reuse.spans) :]])
        return Reuse(end, tuple(spans))

    def begin_apart(self) -> None:
        """Begin again, after a chunk failed that others had a part in."""
        self.apart, self.caches, self.done, self.pending, self.sent = True, [], 0, None, False
        self._grown = []
        if self.constraint is not None:
            self.constraint.go_back(0)
        self.opening = self.open()

    def collect(self) -> None:
        """Take over what its own caches have logged. Lazy."""
        if any(leaf.log for leaf in kinds.leaves(self.caches)):
            self.add_grown(self.loaded.cache_map.drain(self.caches, rows=1)[0])

    def add_grown(self, tensors: Mapping[PartKind, Tensors]) -> None:
        count = next(iter(next(iter(tensors.values())).values())).shape[TOKEN_AXIS]
        self._grown.append((count, tensors))

    def keep_snapshot(self, snapshot: Tensors) -> None:
        """Keep recurrent state as it is after `done` tokens."""
        if self.loaded.cache_map.states:
            self._snapshots[self.done] = snapshot

    @property
    def to_feed(self) -> mx.array:
        """The pending token, shape (1,); lazy."""
        assert self.pending is not None
        return self.pending.token

    def mask(self) -> Mask | None:
        """What may follow the pending token; None for anything. Waits for that token if there is a constraint.

        Raises:
            RanOut
        """
        if self.constraint is None:
            return None
        self.constrain()
        return self.constraint.mask()

    def constrain(self) -> None:
        """Have the constraint stand behind the pending token. Waits for it.

        Raises:
            RanOut
        """
        assert self.constraint is not None
        behind = self.completion[self.constraint.taken :]
        if self.pending is not None and not self.sent and self.constraint.taken <= len(self.completion):
            behind.append(self.pending.read())
        self.constraint.take(behind)

    def run_out(self, why: RanOut) -> None:
        """End here: nothing can be chosen, and all that was sent has its KV."""
        log.warning("an answer ends: its response format can't be followed: %s", " ".join(str(why).split())[:200])
        self.finish = Finish.TOO_COMPLEX

    def sampled(self) -> tuple[int, Logprobs | None]:
        """The pending token and what is to be reported of it; waits for the step that computes them."""
        assert self.pending is not None
        return self.pending.read(), self.pending.logprobs()

    def emit(self, token: int, logprobs: Logprobs | None) -> Delta:
        """Account for one sampled token, which may be the last: what to send.

        Raises:
            NotNumbers: if the pending token was chosen from no numbers.
        """
        if self.pending is not None:
            self.pending.check()
        answer, text = self.job.answer, self.text
        assert answer is not None
        assert text is not None
        if not self.completion:
            self._first_token = time.perf_counter()
        self.completion.append(token)
        piece = text.push(token)
        finish = None
        if text.matched_stop:
            finish = Finish.STOP_SEQUENCE
        elif token in answer.stop_tokens or (token in self.loaded.info.eos_token_ids and not answer.ignore_eos):
            finish = Finish.STOP
        elif (
            len(self.completion) >= answer.max_tokens
            or self.prompt_length + len(self.completion) >= self.loaded.info.context_limit
        ):
            finish = Finish.LENGTH
        if finish in (Finish.STOP, Finish.LENGTH):
            piece += text.finish()
            if text.matched_stop:
                finish = Finish.STOP_SEQUENCE
        self.finish = finish
        return Delta((token,), piece, (logprobs,) if logprobs is not None else ())

    def finished(self) -> Finished:
        """The last event, with the KV evaluated. All tokens of the completion were fed, unless it was cancelled."""
        text = self.text
        behind = text.tokens_behind_stop() if text is not None and text.matched_stop else 0
        completion = self.completion[: len(self.completion) - behind]
        if self.finish in (
            Finish.CANCELLED,
            Finish.TOO_COMPLEX,
        ):  # perhaps after `rewind`: what isn't computed again yet is not kept
            completion = completion[: max(0, self.done - self.prompt_length)]
        now = time.perf_counter()
        return Finished(
            finish=self.finish or Finish.PREFILLED,
            completion=tuple(completion),
            growth=self._growth(min(self.done, self.prompt_length + len(completion)) if self.job.score is None else 0),
            matched_stop=text.matched_stop if text is not None else "",
            prefill_seconds=(self._first_token or now) - self._began,
            decode_seconds=now - self._first_token if self._first_token else 0.0,
            forced=self.forced,
        )

    def _growth(self, end: int) -> Growth:
        start = self.job.reuse.length
        wanted = end - start
        tensors: dict[PartKind, dict[str, mx.array]] = {}
        if self._grown and wanted > 0:
            for kind, family in self._grown[0][1].items():
                tensors[kind] = {
                    name: mx.contiguous(
                        join([piece[kind][name] for _, piece in self._grown], TOKEN_AXIS)[:, :, :wanted]
                    )
                    for name in family
                }
        snapshots = {length: state for length, state in self._snapshots.items() if length <= end}
        mx.eval([list(t.values()) for t in tensors.values()], [list(s.values()) for s in snapshots.values()])
        return Growth(start, max(wanted, 0), tensors, snapshots)


def _cut(span: Span, end: int) -> Span:
    """The span up to a length of the context."""
    count = end - span.start
    return Span(span.start, count, first_tokens(span.parts, count))


def first_tokens(parts: Mapping[PartKind, Tensors], count: int) -> dict[PartKind, Tensors]:
    """Words of the first tokens; recurrent state is left out, since it can't be cut."""
    cut = {kind: policy_of(kind).first(tensors, count) for kind, tensors in parts.items()}
    return {kind: tensors for kind, tensors in cut.items() if tensors is not None}
