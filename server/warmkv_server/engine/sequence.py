"""One sequence on its way through the engine: its caches, its tokens, and the KV it has grown."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from warmkv_server.engine import caches as kinds
from warmkv_server.engine.answer_text import AnswerText
from warmkv_server.engine.codec import join
from warmkv_server.engine.model import LoadedModel
from warmkv_server.engine.sampling import Choice, Chooser
from warmkv_server.engine.types import Delta, Finish, Finished, Job, Logprobs
from warmkv_server.kv.types import TOKEN_AXIS, Growth, PartKind, Tensors


@dataclass(eq=False)
class Sequence:
    """State that only the MLX thread touches.

    Attributes:
        ident: the engine's number for it; the key of everything that is sent back.
        cost: bytes it takes in flight at most.
        caches: its own caches while it runs alone; empty once it shares a group's.
        done: tokens of prompt and answer whose KV is computed.
        completion: tokens of the answer that were sent out.
        pending: the token sampled last, to be fed next.
        opening: what is left to do before the first chunk.
        sent: whether the pending token was sent out already.
    """

    ident: int
    job: Job
    loaded: LoadedModel
    cost: int
    caches: list[Any] = field(default_factory=list)
    done: int = 0
    completion: list[int] = field(default_factory=list)
    opening: Iterator[None] | None = None
    pending: Choice | None = None
    sent: bool = False
    chooser: Chooser | None = None
    text: AnswerText | None = None
    _grown: list[tuple[int, Mapping[PartKind, Tensors]]] = field(default_factory=list)
    _snapshots: dict[int, Tensors] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)
    _first_token: float = 0.0

    @property
    def prompt_length(self) -> int:
        return len(self.job.tokens)

    @property
    def prefill_end(self) -> int:
        """Tokens to prefill in chunks: all, or all but the last, whose logits choose the first token."""
        return self.prompt_length - (self.job.answer is not None)

    def open(self) -> Iterator[None]:
        """Take memory and put the reused prefix in place, in steps."""
        self._began = time.perf_counter()
        self.caches = self.loaded.empty_caches()
        job = self.job
        if job.reuse.length:
            yield from self.loaded.cache_map.fill(self.caches, job.reuse, room=_room(job))
            self.done = job.reuse.length
        if job.answer is not None:
            info = self.loaded.info
            self.chooser = Chooser(job.answer.sampling, job.tokens, info.vocab_size, job.answer.top_logprobs)
            self.text = AnswerText(self.loaded.tokenizer, job.tokens[-1], info.eos_token_ids, job.answer.stop)

    def collect(self) -> None:
        """Take over what its own caches have logged. Lazy."""
        if any(getattr(leaf, "log", None) for leaf in kinds.leaves(self.caches)):
            self.add_grown(self.loaded.cache_map.drain(self.caches, rows=1)[0])

    def add_grown(self, tensors: Mapping[PartKind, Tensors]) -> None:
        count = next(iter(next(iter(tensors.values())).values())).shape[TOKEN_AXIS]
        self._grown.append((count, tensors))

    def keep_snapshot(self, snapshot: Tensors) -> None:
        """Keep recurrent state as it is after `done` tokens."""
        if self.loaded.cache_map.states:
            self._snapshots[self.done] = snapshot

    def sampled(self) -> tuple[int, Logprobs | None]:
        """The pending token and what is to be reported of it; waits for the step that computes them."""
        assert self.pending is not None
        return self.pending.read(), self.pending.logprobs()

    def emit(self, token: int, logprobs: Logprobs | None) -> tuple[Delta, Finish | None]:
        """Account for one sampled token: what to send, and whether the answer ends with it."""
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
        elif token in self.loaded.info.eos_token_ids and not answer.ignore_eos:
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
        return Delta((token,), piece, (logprobs,) if logprobs is not None else ()), finish

    def finished(self, finish: Finish) -> Finished:
        """The last event, with the KV evaluated. All tokens of the completion must have been fed."""
        text = self.text
        if text is not None and text.matched_stop and (behind := text.tokens_behind_stop()):
            del self.completion[-behind:]
        now = time.perf_counter()
        return Finished(
            finish=finish,
            completion=tuple(self.completion),
            growth=self._growth(min(self.done, self.prompt_length + len(self.completion))),
            prompt_ready=self.done >= self.prompt_length,
            matched_stop=text.matched_stop if text is not None else "",
            prefill_seconds=(self._first_token or now) - self._began,
            decode_seconds=now - self._first_token if self._first_token else 0.0,
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


def _room(job: Job) -> int:
    """Tokens to make room for behind a reused prefix: the new prompt and a first stretch of the answer."""
    answer = min(job.answer.max_tokens, 256) if job.answer is not None else 0
    return len(job.tokens) - job.reuse.length + answer
