"""Memory need: what a request takes while it runs, known before it starts, so that admission can bound it.

Most of it is arithmetic on the shapes of the model's caches. What a step computes and throws away again (activations,
scores of attention, copies) depends on the model's code and on the device's kernels, so it is measured once, at load.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from warmkv_server.contract.generation import Job
from warmkv_server.contract.kv import PartKind, inner_boundaries
from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.codecs.codec import KEYS, VALUES
from warmkv_server.engine.cache.layout import CacheMap, Stack
from warmkv_server.engine.model.load import LoadedModel
from warmkv_server.engine.model.step_plan import StepPlan, Wanted
from warmkv_server.engine.output.scoring import COPIES, scored_at_once

_COPIED_LAYERS = 2
"""Layers that are there twice while rows join or leave a batch; the next is copied when one is done."""

_LOGITS = 8
"""Arrays of 4 bytes for each token of the vocabulary that choosing a token takes."""

_PROBE_TOKENS = 256
_PROBE_PREFIX = 1024
"""What is measured: a chunk of so many tokens, behind half of this prefix and behind all of it."""

_MASK = 4
"""Bytes of a mask, for each token of the chunk and of the context, while it is made."""

_SMALLEST = 32
"""A chunk of fewer tokens takes about as much as one of these: operations have a price of their own."""

_MARGIN = 1.35
"""On what was measured: when MLX's threads let go of arrays, and so how many are there at once, varies from run to run
(measured on two cores: by up to a quarter)."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one request.

    Attributes:
        held: from its start to its end: the caches that attention reads, and words beside them.
        copied: besides, for its rows in a batch, whenever the batch is put together anew.
        step: besides, while it is prefilled or ends. Only one request at a time is, or those that share a chunk.
    """

    held: int
    copied: int
    step: int


@dataclass(frozen=True)
class Probe:
    """Temporary bytes of a chunk of `tokens` behind a shorter and a longer prefix, in tokens."""

    tokens: int
    shorter: int
    longer: int
    less: int
    more: int

    @classmethod
    def of(cls, loaded: LoadedModel, chunk: int) -> Probe:
        """Measure. On the MLX thread."""
        limit = loaded.info.context_limit
        if loaded.cache_map.shapes is not None:
            return cls._of_fused(loaded, min(chunk, limit))
        tokens = min(chunk, _PROBE_TOKENS, limit)
        longer = min(_PROBE_PREFIX, limit - tokens)
        shorter = longer // 2
        return cls(tokens, shorter, longer, _temporary(loaded, tokens, shorter), _temporary(loaded, tokens, longer))

    @classmethod
    def _of_fused(cls, loaded: LoadedModel, tokens: int) -> Probe:
        """Where attention is fused, it keeps no scores, and all that grows with the prefix is the mask.

        So a whole chunk is measured: what is under way at once on such a device grows faster than its tokens.
        """
        bytes_ = _temporary(loaded, tokens, 0)
        return cls(tokens, 0, _PROBE_PREFIX, bytes_, bytes_ + _MASK * tokens * _PROBE_PREFIX)

    def at(self, length: int) -> float:
        """Bytes of such a chunk at the end of a context of this length.

        Behind a long prefix most of it are the scores of attention, equally more for each token before. Behind a short
        one it is what it is behind none.
        """
        slope = max(0, self.more - self.less) / max(1, self.longer - self.shorter)
        return max(self.less, self.more + slope * (length - self.tokens - self.longer))


@dataclass(frozen=True)
class MemoryNeeds:
    """What requests need on one model, with prefill chunks of `chunk` tokens."""

    cache_map: CacheMap
    vocab_size: int
    chunk: int
    probe: Probe

    @classmethod
    def on(cls, loaded: LoadedModel, chunk: int) -> MemoryNeeds:
        """Measure the model. On the MLX thread."""
        return cls(loaded.cache_map, loaded.info.vocab_size, chunk, Probe.of(loaded, chunk))

    def of(self, tokens: int, reused: int, answer: int) -> MemoryNeed:
        """The need of a request.

        Args:
            tokens: of the prompt.
            reused: of these, whose KV is there.
            answer: most tokens of the answer.
        """
        layout, length = self.cache_map.layout, tokens + answer
        words = layout.nbytes(PartKind.APPEND) + layout.nbytes(PartKind.WINDOW)
        room = self.cache_map.capacity(length)
        logged = self.cache_map.live_bytes(min(answer, kinds.DRAIN_EVERY)) if answer else 0  # words not made yet
        logits = _LOGITS * 4 * self.vocab_size if answer else 0
        # One snapshot of recurrent state is counted with the caches.
        snapshots = sum(layout.nbytes(kind) for kind in layout.snapshots) * sum(
            boundary > reused for boundary in inner_boundaries(tokens)
        )
        layer = max((self._layer(keys, values, room) for keys, values in _layers(self.cache_map).values()), default=0)
        return MemoryNeed(
            # The words of what is reused are beside it while they are unpacked, those of what is computed to the end.
            held=self.cache_map.live_bytes(room, self.chunk) + words * length + logged + logits + snapshots,
            copied=_COPIED_LAYERS * layer,
            # In the end the words of all steps are joined, through a copy.
            step=max(self._chunk(min(self.chunk, length - reused), length, layer), 2 * words * (length - reused)),
        )

    def of_job(self, job: Job) -> MemoryNeed:
        need = self.of(len(job.tokens), job.reuse.length, job.answer.max_tokens if job.answer is not None else 0)
        if job.score is None:
            return need
        return replace(need, step=need.step + COPIES * 4 * self.vocab_size * scored_at_once(self.vocab_size))

    def _layer(self, keys: Stack, values: Stack, tokens: int) -> int:
        """Bytes of one layer's cache."""
        return sum(
            self.cache_map.kept(stack.kind, tokens, self.chunk) * stack.heads * stack.head_dim * stack.dtype.size
            for stack in (keys, values)
        )

    def _chunk(self, tokens: int, length: int, layer: int) -> int:
        """Temporary bytes of a chunk at the end of a context of this length, whose largest layer has `layer` bytes.

        In proportion to its tokens, besides the copy of a layer that grows.
        """
        computed = max(0.0, self.probe.at(length) - layer) * max(tokens, _SMALLEST) / self.probe.tokens
        return int(_MARGIN * (computed + 2 * layer))


def _layers(cache_map: CacheMap) -> dict[int, tuple[Stack, Stack]]:
    """Keys and values of each leaf that has them."""
    leaves = {leaf for stack in cache_map.stacks for leaf, _ in stack.streams}
    return {leaf: cache_map.streams_of(leaf) for leaf in leaves}


def _temporary(loaded: LoadedModel, tokens: int, prefix: int) -> int:
    """Bytes that a chunk of so many tokens behind a prefix takes besides what was there before."""
    with _nothing_going():
        caches = _zeros(loaded, prefix, tokens)
        mx.synchronize()  # a stream lets go of what its last operation took a little after that is done
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        loaded.runner.probe(StepPlan.probe([0] * tokens, prefix, Wanted.NOTHING), caches)
        mx.eval(kinds.arrays(caches))
        return max(0, mx.get_peak_memory() - before)


@contextmanager
def _nothing_going() -> Iterator[None]:
    """Keep garbage of the load for a while: were it to go while memory is measured, a step would seem to take less."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _zeros(loaded: LoadedModel, length: int, more: int) -> list[Any]:
    """Caches of a context whose keys and values are zeros. Recurrent state begins there.

    Args:
        more: tokens that will follow. Of few shapes, caches have room for them, so that no growth is measured.
    """
    caches, shapes = loaded.cache_map.empty_caches(loaded.model), loaded.cache_map.shapes
    room = shapes.length(length + shapes.tokens(more)) - length if shapes is not None else 0
    if length + room:
        members = kinds.token_leaves(caches)
        for leaf, (keys, values) in _layers(loaded.cache_map).items():
            kept = loaded.cache_map.kept(keys.kind, length) + room
            filled = [mx.zeros((1, stack.heads, kept, stack.head_dim), stack.dtype) for stack in (keys, values)]
            mx.eval(filled)
            members[leaf].fill(filled[KEYS], filled[VALUES], length)
    return caches
