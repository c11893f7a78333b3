"""Coding keys and values once, when they are computed: what a codec is, and which one each stream has.

Every attention reads the coded value, also inside the chunk that computed it; only the words are stored. So KV that
comes back from disk is what attention read the first time, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import mlx.core as mx
import xxhash

from warmkv_server.contract.kv_choice import KvChoice

Words = tuple[mx.array, ...]
"""What is stored of one stream: its components, each (rows, kv_heads, tokens, width)."""

Position = int | tuple[int, ...] | mx.array
"""Of the first token, in its context: one for all rows, or one for each, (rows,) where it isn't known before the device
has computed it."""

Coded = tuple[Words, ...]
"""A layer's keys' words and its values'; or both as one, side by side along the axis of heads."""

KEYS, VALUES = 0, 1

Stream = tuple[int, int]
"""(leaf, KEYS or VALUES): one layer's keys or values."""


class Component(NamedTuple):
    """One array of a stream's words."""

    name: str
    width: int
    """Elements for each token and head."""
    dtype: mx.Dtype
    """As `Codec.encode` gives it; on disk it is what `storable` makes of it."""


class Codec(Protocol):
    """Turns a stream, (rows, kv_heads, tokens, head_dim), into words and back.

    Each token by itself: its words, and what is read of them, don't depend on what is coded beside it. So words are cut
    and joined at any token. What is read must not depend on where the words come from, nor on how many there are.
    """

    @property
    def bits(self) -> int:
        """Of a value's word, scales and the like aside; 0 if values are stored as they are computed."""

    @property
    def group_size(self) -> int:
        """Values that share a scale; 0 if none do."""

    @property
    def identity(self) -> str:
        """All that words and their meaning depend on; "" if values are stored as they are computed."""

    def components(self, head_dim: int, dtype: mx.Dtype, /) -> tuple[Component, ...]:
        """The words of a stream of this width, computed in this type.

        Raises:
            OperatorError: if it can't be coded; the message goes on behind the layer's name.
        """

    def encode(self, x: mx.array, start: Position, /) -> Words: ...

    def decode(self, words: Words, dtype: mx.Dtype, start: Position, /) -> mx.array:
        """The values that attention reads, in the model's type."""

    def step(self, x: mx.array, start: Position, /) -> tuple[Words, mx.array]:
        """What attention reads of one token, and that of which `words_of` makes its words: later, of many at once.

        It may be coded otherwise than among others by `encode`; what is read is what its words will give.
        """

    def words_of(self, stepped: Words, start: Position, /) -> Words:
        """Of what `step` gave, of one step or of several that were joined."""


@runtime_checkable
class PairCodec(Codec, Protocol):
    """One that codes two streams of a shape at once, side by side along the axis of heads, as it would each of them.

    What a step of decoding costs is the count of its operations, and these are half.
    """

    def beside(self, other: Codec, /) -> PairCodec | None:
        """The codec of both at once, of keys as this one and of values as the other; None if there is none."""

    def read_back(self, keys: mx.array, values: mx.array, start: Position, /) -> tuple[Coded, mx.array, mx.array]:
        """What attention reads of both, where their words can wait: in as few operations as the device allows.

        Returns what `words_of` makes words of, of each or of both side by side; and the keys and values to read.
        """


@dataclass(frozen=True)
class LayerCodec:
    """The codecs of one layer, used together where that takes fewer operations."""

    keys: Codec
    values: Codec

    @cached_property
    def _pair(self) -> PairCodec | None:
        return self.keys.beside(self.values) if isinstance(self.keys, PairCodec) else None

    def encode(self, keys: mx.array, values: mx.array, start: Position) -> Coded:
        if self._pair is not None and keys.shape == values.shape:
            return (self._pair.encode(side_by_side(keys, values), start),)
        return self.keys.encode(keys, start), self.values.encode(values, start)

    def decode(self, coded: Coded, dtype: mx.Dtype, start: Position) -> tuple[mx.array, mx.array]:
        """The keys and values that attention reads, in the model's type."""
        if len(coded) == 1:
            assert self._pair is not None
            both = self._pair.decode(coded[0], dtype, start)
            heads = both.shape[1] // 2
            return both[:, :heads], both[:, heads:]
        keys, values = coded
        return self.keys.decode(keys, dtype, start), self.values.decode(values, dtype, start)

    def read_back(self, keys: mx.array, values: mx.array, start: Position) -> tuple[Coded, mx.array, mx.array]:
        """The same in one, of one token, whose words can wait. Returns also what `words_of` makes them of."""
        if self._pair is not None and keys.shape == values.shape:
            return self._pair.read_back(keys, values, start)
        stepped_keys, keys = self.keys.step(keys, start)
        stepped_values, values = self.values.step(values, start)
        return (stepped_keys, stepped_values), keys, values

    def words_of(self, stepped: Coded, start: Position) -> Coded:
        """Of what `read_back` gave, of one step or of several that were joined."""
        if len(stepped) == 1:
            assert self._pair is not None
            return (self._pair.words_of(stepped[0], start),)
        keys, values = stepped
        return self.keys.words_of(keys, start), self.values.words_of(values, start)


class Finding(NamedTuple):
    """What was found of a stream on a short text."""

    loss: float
    """Of what tells tokens apart, the share that its codec loses."""
    reason: str = ""
    """Why it doesn't have the codec that was asked for; empty if it has."""


@dataclass(frozen=True)
class CodecPlan:
    """Which codec each stream has.

    Attributes:
        default: of all streams but those in `streams`.
        asked: what the operator asked for, where it has to be made for a model.
        findings: of each stream that was looked at when it was.
    """

    default: Codec
    streams: Mapping[Stream, Codec] = field(default_factory=dict)
    asked: KvChoice | None = None
    findings: Mapping[Stream, Finding] = field(default_factory=dict)

    def of_stream(self, stream: Stream) -> Codec:
        return self.streams.get(stream, self.default)

    def of_layer(self, leaf: int) -> LayerCodec:
        if leaf not in self._layers:
            self._layers[leaf] = LayerCodec(self.of_stream((leaf, KEYS)), self.of_stream((leaf, VALUES)))
        return self._layers[leaf]

    @cached_property
    def _layers(self) -> dict[int, LayerCodec]:
        """Those that were asked for: every sequence's caches ask again."""
        return {}

    @property
    def bits(self) -> int:
        """Of a value's word; 0 if values are stored as they are computed."""
        return self.default.bits

    @property
    def group_size(self) -> int:
        """Values that share a scale; 0 if none do."""
        return self.default.group_size

    def fingerprint_fields(self) -> dict[str, str]:
        """What the words depend on. Bits and group size alone mean affine quantisation; for others there is more."""
        fields = {"kv_bits": str(self.bits), "kv_group_size": str(self.group_size)}
        if self.default.identity != (f"affine-{self.bits}-{self.group_size}" if self.bits else ""):
            fields["kv_codec"] = self.default.identity
        if self.asked is not None:
            fields["kv"] = str(self.asked)
        if self.streams:
            told = [(*stream, codec.identity) for stream, codec in self.streams.items()]
            fields["kv_streams"] = xxhash.xxh3_128(repr(sorted(told)).encode()).hexdigest()
        return fields


def apart(coded: Coded) -> tuple[Words, Words]:
    """Keys' words and values', each by themselves."""
    if len(coded) == 2:
        return coded[KEYS], coded[VALUES]
    (both,) = coded
    heads = both[0].shape[1] // 2
    return tuple(part[:, :heads] for part in both), tuple(part[:, heads:] for part in both)


def join_tokens(pieces: Sequence[Coded]) -> Coded:
    """Of one form, behind each other."""
    return tuple(tuple(join(column, -2) for column in zip(*part, strict=True)) for part in zip(*pieces, strict=True))


def cut_tokens(coded: Coded, count: int) -> Coded:
    """The first so many."""
    return tuple(tuple(component[..., :count, :] for component in part) for part in coded)


def side_by_side(keys: mx.array, values: mx.array) -> mx.array:
    """Of one shape, along the axis of heads."""
    return mx.concatenate([keys, values], axis=1)


def storable(array: mx.array) -> mx.array:
    """The same bytes in a type that numpy has."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


def restored(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Undoes `storable` for an array that had this type."""
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def stored_as(dtype: mx.Dtype) -> str:
    """numpy's name of the type that `storable` gives."""
    return "uint16" if dtype == mx.bfloat16 else str(dtype).removeprefix("mlx.core.")


def join(pieces: Sequence[mx.array], axis: int) -> mx.array:
    """Concatenates, without a copy when there is one piece."""
    return pieces[0] if len(pieces) == 1 else mx.concatenate(list(pieces), axis=axis)
