"""What a model is, as far as anybody but the engine has to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from warmkv_server.contract.generation import Sampling
from warmkv_server.contract.kv import KVLayout


class ModelKind(StrEnum):
    BUILT_IN = "built_in"
    LOCAL = "local"
    HUB = "hub"
    RANDOM = "random"
    """Random weights: noise, for tests and benchmarks of geometry."""


class EndSource(StrEnum):
    GENERATION_CONFIG = "generation_config"
    CONFIG = "config"
    TOKENIZER = "tokenizer"
    CHAT_TEMPLATE = "chat_template"


@dataclass(frozen=True)
class End:
    """A token that ends an answer: its id, how the tokenizer writes it, and everything that names it."""

    token_id: int
    text: str
    sources: tuple[EndSource, ...]


@dataclass(frozen=True)
class StreamInfo:
    """How a cache's keys or values are stored."""

    codec: str
    """Such as affine4, or exact."""
    bits: int
    group_size: int
    loss: float | None = None
    """The share of what tells tokens apart that it loses on a short text; None where it wasn't measured."""
    reason: str = ""
    """Why it isn't the codec that was asked for."""


@dataclass(frozen=True)
class Features:
    """What a model can do, as far as its chat template shows it.

    Attributes:
        tool_format: of its calls; empty if it has no tools.
        reasoning_marks: around its reasoning.
        keeps_reasoning: whether the template writes that of earlier answers again.
        response_formats: that answers can be held to.
    """

    tool_format: str = ""
    reasoning_marks: tuple[str, ...] = ()
    template_variables: tuple[str, ...] = ()
    keeps_reasoning: bool = False
    response_formats: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerInfo:
    """One cache of the model. A model whose layers share KV has fewer of them than layers."""

    cache_kind: str
    """append, window, state or composite."""
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    members: tuple[LayerInfo, ...] = ()
    """The parts of a composite cache."""
    keys: StreamInfo | None = None
    values: StreamInfo | None = None
    """How they are stored; None for recurrent and composite caches."""

    @property
    def streams(self) -> tuple[StreamInfo, ...]:
        """Its keys and values, or those of its members."""
        own = tuple(stream for stream in (self.keys, self.values) if stream is not None)
        return own + tuple(stream for member in self.members for stream in member.streams)


@dataclass(frozen=True)
class ModelInfo:
    """What the server says about its model."""

    model_id: str
    kind: ModelKind
    weights_digest: str
    device: str
    blas: str
    context_limit: int
    vocab_size: int
    layers: tuple[LayerInfo, ...]
    kv_bits: int
    kv_group_size: int
    kv_bytes_per_token: int
    """Bytes at rest of one token's KV in layers that keep every token."""
    layout: KVLayout
    fingerprint_fields: Mapping[str, str]
    sampling_defaults: Sampling
    ends: tuple[End, ...]
    chat_template_digest: str = ""
    """Empty if there is none."""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def streams(self) -> tuple[StreamInfo, ...]:
        """How keys and values are stored, of all caches in order."""
        return tuple(stream for layer in self.layers for stream in layer.streams)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(end.token_id for end in self.ends)
