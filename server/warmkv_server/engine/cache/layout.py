"""The layout of the KV: from a model's caches to stacked tensors and back.

A model has many small streams (one layer's keys, one layer's values). Streams of equal kind and shape are stacked into
one array (streams, kv_heads, tokens, width), because a block of two hundred small tensors reads at a third of the
speed of one of six.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from warmkv_server.contract.kv import TOKEN_AXIS, KVLayout, PartKind, Reuse, Tensors, policy_of
from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.cache.attention_shapes import AttentionShapes
from warmkv_server.engine.cache.codecs.codec import (
    KEYS,
    VALUES,
    CodecPlan,
    Component,
    Position,
    Stream,
    join,
    restored,
    storable,
)

CAPACITY_STEP = 256
"""Tokens by which mlx-lm's caches grow: so many more than it holds may a cache have room for. Fused attention on CUDA
wants capacities that are multiples of it."""

FILL_BYTES = 64 << 20
"""Bytes of caches filled at once: many small layers together, large ones one at a time."""


@dataclass(frozen=True)
class Stack:
    """Streams whose words are alike, stacked in one family of tensors: one tensor for each component."""

    name: str
    kind: PartKind
    streams: tuple[Stream, ...]
    """In stacking order."""
    heads: int
    head_dim: int
    dtype: mx.Dtype
    """Of the values that attention reads."""
    components: tuple[Component, ...]
    """Of the words of each stream."""

    def tensor(self, component: Component) -> str:
        return f"{self.name}.{component.name}"

    @property
    def live_bytes(self) -> int:
        """Bytes a token takes in the caches in flight."""
        return len(self.streams) * self.heads * self.head_dim * self.dtype.size


@dataclass(frozen=True)
class CacheMap:
    """How one model's caches map to tensors."""

    codecs: CodecPlan
    stacks: tuple[Stack, ...]
    states: Mapping[tuple[int, int], mx.Dtype]
    """(leaf, index) of the arrays of recurrent leaves."""
    layout: KVLayout
    shapes: AttentionShapes | None = None
    """Those that attention is to be given; None where any will do."""

    def empty_caches(self, model: Any) -> list[Any]:
        """Empty caches of one sequence."""
        return kinds.empty_caches(model, self.codecs, self.shapes)

    def capacity(self, tokens: int) -> int:
        """The most tokens for which caches that keep every token have room, when they hold so many."""
        return tokens + CAPACITY_STEP if self.shapes is None else self.shapes.room(tokens)

    @property
    def can_be_cut(self) -> bool:
        """Whether every cache can forget its last tokens."""
        return not self.states and all(policy_of(stack.kind).everywhere for stack in self.stacks)

    def live_bytes(self, tokens: int, chunk: int = 0) -> int:
        """Bytes of the caches in flight of one sequence of that many tokens, words of new tokens aside.

        Args:
            chunk: tokens computed at once: until the next step, a windowed layer holds them besides its window.
        """
        total = sum(self.layout.nbytes(kind) for kind in self.layout.snapshots)
        for stack in self.stacks:
            total += self.kept(stack.kind, tokens, chunk) * stack.live_bytes
        return total

    def kept(self, kind: PartKind, tokens: int, chunk: int = 0) -> int:
        """Of that many tokens, those that a layer of this kind holds."""
        return policy_of(kind).held(self.layout, tokens, chunk)

    def streams_of(self, leaf: int) -> tuple[Stack, Stack]:
        """The stacks that hold a leaf's keys and its values."""
        found = {side: stack for stack in self.stacks for number, side in stack.streams if number == leaf}
        return found[KEYS], found[VALUES]

    def drain(self, caches: Sequence[Any], rows: int) -> list[dict[PartKind, Tensors]]:
        """Take what the caches have logged: for each row, tensors over the tokens logged since the last drain.

        The arrays are lazy. All rows must have been there for all of those tokens.
        """
        members = kinds.token_leaves(caches)
        taken = {leaf: members[leaf].take() for leaf in {leaf for stack in self.stacks for leaf, _ in stack.streams}}
        drained: list[dict[PartKind, dict[str, mx.array]]] = [{} for _ in range(rows)]
        for stack in self.stacks:
            for number, component in enumerate(stack.components):
                stacked = mx.stack([taken[leaf][side][number] for leaf, side in stack.streams])
                for row, tensors in enumerate(drained):
                    tensors.setdefault(stack.kind, {})[stack.tensor(component)] = storable(
                        mx.contiguous(stacked[:, row])
                    )
        return [dict(tensors) for tensors in drained]

    def snapshot(self, caches: Sequence[Any], row: int = 0) -> Tensors:
        """The recurrent state as it is now. Models replace these arrays and never write to them: no copy is needed."""
        members = kinds.state_leaves(caches)
        return {state_name(leaf, index): storable(members[leaf][index][row : row + 1]) for leaf, index in self.states}

    def fill(self, caches: Sequence[Any], reuse: Reuse, room: int) -> Iterator[None]:
        """Put a loaded prefix into empty caches, some layers at a time: what is left can wait at every `yield`.

        Args:
            caches: one sequence's, fresh from the model.
            reuse: its spans cover [0, length); words beyond length are cut off.
            room: tokens that will follow, for which memory is taken at once instead of by copying as they come.
        """
        members = kinds.token_leaves(caches)
        streams: dict[Stream, mx.array] = {}
        for stack in self.stacks:
            start, components = self._assemble(stack, reuse, room if policy_of(stack.kind).everywhere else 0)
            mx.eval(components)
            yield
            for number, stream in enumerate(stack.streams):
                words = tuple(component[number : number + 1] for component in components)
                streams[stream] = self.codecs.of_stream(stream).decode(words, stack.dtype, start)
        filled: list[mx.array] = []
        for leaf in sorted({leaf for leaf, _ in streams}):
            keys, values = streams.pop((leaf, KEYS)), streams.pop((leaf, VALUES))
            members[leaf].fill(keys, values, reuse.length)
            filled += [keys, values]
            if sum(array.nbytes for array in filled) >= FILL_BYTES or not streams:
                mx.eval(filled)
                filled.clear()
                yield
        if self.states:
            assert reuse.spans[-1].end == reuse.length  # a snapshot of a longer context is another one
            state = reuse.spans[-1].parts[PartKind.STATE]
            holders = kinds.state_leaves(caches)
            for (leaf, index), dtype in self.states.items():
                holders[leaf][index] = restored(state[state_name(leaf, index)], dtype)

    def _behind(self, held: int, room: int) -> int:
        """Tokens of memory behind those that are held, for so many that follow at least."""
        if self.shapes is not None:
            return self.shapes.capacity(self.shapes.length(held + room)) - held
        return room + -(held + room) % CAPACITY_STEP

    def _assemble(self, stack: Stack, reuse: Reuse, room: int) -> tuple[Position, list[mx.array]]:
        """Words of a stack's streams, and the position of the first of their tokens."""
        spans = [span for span in reuse.spans if stack.kind in span.parts]
        assert spans[0].start <= policy_of(stack.kind).needs(self.layout, reuse.length)[0].start
        wanted = reuse.length - spans[0].start
        components = []
        for component in stack.components:
            pieces = [span.parts[stack.kind][stack.tensor(component)] for span in spans]
            pieces[-1] = pieces[-1][:, :, : reuse.length - spans[-1].start]
            behind = self._behind(wanted, room) if room else 0
            if behind:
                streams, heads, _, width = pieces[0].shape
                pieces.append(mx.zeros((streams, heads, behind, width), pieces[0].dtype))
            joined = join(pieces, TOKEN_AXIS)
            assert joined.shape[TOKEN_AXIS] >= wanted + room
            components.append(restored(joined, component.dtype))
        return spans[0].start, components


def state_name(leaf: int, index: int) -> str:
    return f"state.{leaf}.{index}"
