"""The words that the engine and the store use for KV.

A context of n tokens has KV of up to three kinds. The store never looks inside: it cuts, joins, writes and reads
these arrays as bytes, so a stored value is only ever copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import ClassVar

import mlx.core as mx

BLOCK_TOKENS = 256
"""Tokens in a full block."""

TOKEN_AXIS = 2
"""The axis of a tensor of kind APPEND or WINDOW along which tokens run: (streams, kv_heads, tokens, width)."""

STRIDES = (2_048, 8_192, 32_768, 131_072)
"""Where a long turn can be taken up again inside, by models whose KV can't be cut at any token."""

Tensors = Mapping[str, mx.array]
"""Evaluated arrays by name, of dtypes that numpy has (16-bit brain floats travel as uint16)."""


class PartKind(str):
    """The name of a kind of KV: how a part of it depends on the tokens before it.

    Anybody may name another one: what the store and the engine have to know of a kind, its `KindPolicy` says.
    """

    __slots__ = ()

    APPEND: ClassVar[PartKind]
    """Every token's entry is needed for as long as the context lasts. Can be cut and shared at any token."""

    WINDOW: ClassVar[PartKind]
    """Only the last `KVLayout.window` tokens' entries are needed (sliding-window and chunked attention)."""

    STATE: ClassVar[PartKind]
    """No token axis: a snapshot of recurrent state after exactly so many tokens. Can't be cut."""


PartKind.APPEND, PartKind.WINDOW, PartKind.STATE = PartKind("append"), PartKind("window"), PartKind("state")


@dataclass(frozen=True)
class TensorSpec:
    """One stacked tensor: the same component of all streams of one shape.

    A stream is one layer's keys or values. For APPEND and WINDOW the stored array has shape
    (streams, kv_heads, tokens, width); for STATE, `shape` is the array's own.
    """

    name: str
    kind: PartKind
    dtype: str
    """numpy's name of the dtype."""
    shape: tuple[int, ...]
    """(streams, kv_heads, width) for APPEND and WINDOW; the full shape for STATE."""
    nbytes: int
    """Bytes a token for APPEND and WINDOW; bytes a snapshot for STATE."""
    codecs: tuple[str, ...] = ()
    """How each of its streams is coded (see docs/format.md); empty where all are stored as the model keeps them."""


@dataclass(frozen=True)
class KVLayout:
    """What a model's KV is made of. Fixed for as long as the model is loaded; part of the fingerprint."""

    tensors: tuple[TensorSpec, ...]
    window: int = 0
    """Tokens that the widest windowed layer looks back on; 0 without such layers."""
    vocabulary: int = 1 << 31
    """Token ids are below."""

    def of_kind(self, kind: PartKind) -> tuple[TensorSpec, ...]:
        return tuple(t for t in self.tensors if t.kind == kind)

    def nbytes(self, kind: PartKind) -> int:
        """Bytes a token (APPEND, WINDOW) or a snapshot (STATE) of that kind."""
        return sum(t.nbytes for t in self.tensors if t.kind == kind)

    @cached_property
    def policies(self) -> tuple[KindPolicy, ...]:
        """Of the kinds that it has tensors of, in the order of the tensors."""
        return tuple(policy_of(kind) for kind in dict.fromkeys(t.kind for t in self.tensors))

    @cached_property
    def everywhere(self) -> tuple[PartKind, ...]:
        """Kinds that every block of a context has a part of. APPEND is always one, without tensors if need be: its
        files carry the tokens."""
        others = (p.kind for p in self.policies if p.everywhere and p.kind != PartKind.APPEND)
        return PartKind.APPEND, *others

    @cached_property
    def partial(self) -> tuple[KindPolicy, ...]:
        """Of the kinds that only some blocks of a context have a part of."""
        return tuple(p for p in self.policies if p.partial)

    @cached_property
    def snapshots(self) -> tuple[PartKind, ...]:
        """Kinds that are captured at lengths of the context."""
        return tuple(p.kind for p in self.policies if p.snapshot)

    def context_bytes(self, length: int) -> int:
        """Bytes at rest of a context of so many tokens: what it needs to be gone on with."""
        return sum(policy.nbytes(self, policy.held(self, length)) for policy in self.policies)

    @property
    def has_state(self) -> bool:
        """Whether there is anything that can be taken up only where it was captured."""
        return bool(self.snapshots)


Ranges = tuple[range, ...]
"""Tokens of a context, counted from its start; ascending, apart from each other."""


class KindPolicy(ABC):
    """What the store and the engine have to know of a kind: one class for each, and nowhere else a word about it.

    A new kind is a class here, or wherever it is registered from. A composite cache has none: each member has its own.

    Attributes:
        kind: its name, also in the names of files: small letters and digits.
        everywhere: all tokens' entries are needed for as long as the context lasts, so every block keeps its part.
            Other kinds are kept where a boundary needs them, and evicted elsewhere.
        snapshot: it has no token axis, and is kept at lengths of the context at which it was captured.
    """

    kind: PartKind
    everywhere: bool = False
    snapshot: bool = False

    @property
    def partial(self) -> bool:
        """Whether some nodes of a context have a part of it and others have not."""
        return not self.everywhere and not self.snapshot

    @abstractmethod
    def needs(self, layout: KVLayout, length: int) -> Ranges:
        """The tokens whose entries are needed to go on after the first `length`.

        Of the tokens below a smaller length, that length needs at least as many: where an entry is lacking, no length
        between it and here will do either.
        """

    @abstractmethod
    def stored_shape(self, spec: TensorSpec, count: int) -> tuple[int, ...]:
        """Shape of the stored array for `count` tokens, or of a snapshot."""

    @abstractmethod
    def first(self, tensors: Tensors, count: int) -> Tensors | None:
        """Those of the first tokens alone; None if they can't be cut."""

    def nbytes(self, layout: KVLayout, tokens: int) -> int:
        """Bytes of the parts of so many tokens, or of a snapshot."""
        return layout.nbytes(self.kind) * tokens

    def held(self, layout: KVLayout, length: int, chunk: int = 0) -> int:
        """Tokens whose entries a layer's cache holds in flight, of a context of that length.

        Args:
            chunk: tokens computed at once, which it holds besides until the next step.
        """
        needed = self.needs(layout, length)
        return min(length, sum(len(each) for each in needed) + chunk)


class AlongTokens(KindPolicy):
    """An entry a token: arrays (streams, kv_heads, tokens, width), which can be cut and joined between any two."""

    def stored_shape(self, spec: TensorSpec, count: int) -> tuple[int, ...]:
        streams, heads, width = spec.shape
        return streams, heads, count, width

    def first(self, tensors: Tensors, count: int) -> Tensors:
        return {name: array[:, :, :count] for name, array in tensors.items()}


class Append(AlongTokens):
    """Attention over all tokens."""

    kind = PartKind.APPEND
    everywhere = True

    def needs(self, layout: KVLayout, length: int) -> Ranges:  # noqa: ARG002
        return (range(length),)


class Window(AlongTokens):
    """Attention over the last `KVLayout.window` tokens."""

    kind = PartKind.WINDOW

    def needs(self, layout: KVLayout, length: int) -> Ranges:
        return (range(max(length - layout.window, 0), length),)


class State(KindPolicy):
    """Recurrent state: nothing of it belongs to a token, and it can't be cut."""

    kind = PartKind.STATE
    snapshot = True

    def needs(self, layout: KVLayout, length: int) -> Ranges:  # noqa: ARG002
        return ()

    def stored_shape(self, spec: TensorSpec, count: int) -> tuple[int, ...]:  # noqa: ARG002
        return spec.shape

    def first(self, tensors: Tensors, count: int) -> None:  # noqa: ARG002
        return None

    def nbytes(self, layout: KVLayout, tokens: int) -> int:  # noqa: ARG002
        return layout.nbytes(self.kind)


_POLICIES: dict[PartKind, KindPolicy] = {}


def register(policy: KindPolicy) -> None:
    """Have a kind known; before any directory is opened that holds it."""
    _POLICIES[policy.kind] = policy


for _policy in (Append(), Window(), State()):
    register(_policy)


def policy_of(kind: PartKind) -> KindPolicy:
    """
    Raises:
        KeyError: nobody knows this kind.
    """
    return _POLICIES[kind]


def known_kind(name: str) -> PartKind:
    """
    Raises:
        ValueError: nobody knows this kind.
    """
    if name not in _POLICIES:
        raise ValueError(f"{name!r} is not a kind of KV")
    return PartKind(name)


def all_kinds() -> tuple[PartKind, ...]:
    """In the order in which they were registered."""
    return tuple(_POLICIES)


@dataclass(frozen=True)
class Span:
    """The KV of tokens [start, start + count) of one context, in RAM.

    `parts` may lack WINDOW where the tokens lie before the window, and has STATE only if a snapshot was taken after
    exactly start + count tokens.
    """

    start: int
    count: int
    parts: Mapping[PartKind, Tensors]

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class Growth:
    """The KV that the engine computed for tokens [start, start + count), to be committed behind what was reused.

    Attributes:
        tensors: APPEND and WINDOW tensors over exactly those tokens.
        snapshots: STATE tensors by absolute length of the context after which they were taken.
    """

    start: int
    count: int
    tensors: Mapping[PartKind, Tensors] = field(default_factory=dict)
    snapshots: Mapping[int, Tensors] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + self.count


def inner_boundaries(length: int) -> frozenset[int]:
    """Lengths before `length` at which a context is kept so that an edit inside a long turn doesn't cost all of it.

    The last two multiples of each stride: an edit d tokens before the end finds one at most twice the next larger
    stride before the end, or there is no more than that to compute anyway. Each is among those of every shorter context
    that reaches it, so a context that grows never wants one that was let go of.
    """
    return frozenset(boundary for stride in STRIDES for boundary in _last_multiples(stride, length - 1) if boundary > 0)


def _last_multiples(stride: int, most: int) -> tuple[int, int]:
    last = most - most % stride
    return last - stride, last


class Source(StrEnum):
    """Where the reused KV of a request came from."""

    COLD = "cold"
    SHARED = "shared"
    WARM = "warm"
    HOT = "hot"


class Fallback(StrEnum):
    """Why less was reused than the store's records promised."""

    CHECKSUM = "checksum"
    MISSING_BLOCK = "missing_block"
    FINGERPRINT = "fingerprint"
    FORMAT = "format"
    NOT_TRIMMABLE = "not_trimmable"
    LOAD_TIMEOUT = "load_timeout"
    QUARANTINED = "quarantined"


@dataclass(frozen=True)
class Reuse:
    """The prefix of a requested context whose KV need not be computed, loaded and verified.

    Attributes:
        length: tokens reused. `spans` cover [0, length) in order; the last may reach beyond it, and the engine cuts.
        hot_tokens: of the agent's own, found in RAM.
        warm_tokens: of the agent's own, read from disk for this request.
        shared_tokens: of other agents' blocks, wherever they were.
        bytes_loaded: bytes read from files for this request.
        fallback: why it is shorter than the records promised, if it is.
        seconds: time the load took.
    """

    length: int = 0
    spans: tuple[Span, ...] = ()
    hot_tokens: int = 0
    warm_tokens: int = 0
    shared_tokens: int = 0
    bytes_loaded: int = 0
    fallback: Fallback | None = None
    seconds: float = 0.0

    @property
    def source(self) -> Source:
        if self.warm_tokens:
            return Source.WARM
        if self.hot_tokens:
            return Source.HOT
        return Source.SHARED if self.shared_tokens else Source.COLD
