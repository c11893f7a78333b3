"""What the server says about its model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import ArraysCache, CacheList

from warmkv_server.contract.generation import Sampling
from warmkv_server.contract.kv import KVLayout, PartKind
from warmkv_server.engine.cache.layout import CacheMap, empty_caches
from warmkv_server.engine.model.ends import End
from warmkv_server.engine.model.locate import ModelKind
from warmkv_server.errors import OperatorError


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
    has_chat_template: bool
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(end.token_id for end in self.ends)


def layers(model: Any, cache_map: CacheMap) -> tuple[LayerInfo, ...]:
    """The model's caches."""
    leaf = itertools.count()

    def describe(cache: Any) -> LayerInfo:
        if isinstance(cache, CacheList):
            return LayerInfo("composite", members=tuple(describe(member) for member in cache.caches))
        number = next(leaf)
        if isinstance(cache, ArraysCache):
            return LayerInfo(PartKind.STATE.value)
        keys, values = cache_map.streams_of(number)
        window = int(getattr(cache, "window", 0))
        return LayerInfo(keys.kind.value, keys.heads, keys.head_dim, values.head_dim, window)

    return tuple(describe(cache) for cache in empty_caches(model, cache_map.codec))


def sampling_defaults(folder: Path | None) -> Sampling:
    """The model author's own recommendation where there is one (generation_config.json), else greedy."""
    path = folder / "generation_config.json" if folder else None
    if path is None or not path.is_file():
        return Sampling()
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise OperatorError(f"{path} is not valid JSON: {error}") from error
    if not config.get("do_sample", False):
        return Sampling()

    def said(name: str, default: float) -> float:
        value = config.get(name)
        return default if value is None else float(value)

    return Sampling(
        temperature=said("temperature", 1.0),
        top_p=said("top_p", 1.0),
        top_k=int(said("top_k", 0)),
        min_p=said("min_p", 0.0),
        repetition_penalty=said("repetition_penalty", 1.0) or 1.0,
    )
