"""What the server says about its model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import CacheList

from warmkv_server.contract.generation import Sampling
from warmkv_server.contract.kv import PartKind
from warmkv_server.contract.model import LayerInfo, StreamInfo
from warmkv_server.engine.cache.codecs.codec import KEYS, VALUES, CodecPlan, Stream
from warmkv_server.engine.cache.layer_cache import LayerCache
from warmkv_server.engine.cache.layout import CacheMap
from warmkv_server.errors import OperatorError


def layers(model: Any, cache_map: CacheMap) -> tuple[LayerInfo, ...]:
    """The model's caches."""
    leaf = itertools.count()

    def describe(cache: LayerCache | CacheList) -> LayerInfo:
        if isinstance(cache, CacheList):
            return LayerInfo("composite", members=tuple(describe(member) for member in cache.caches))
        number = next(leaf)
        if cache.kind == PartKind.STATE:
            return LayerInfo(PartKind.STATE)
        keys, values = cache_map.streams_of(number)
        coded = [_stream(cache_map.codecs, (number, side)) for side in (KEYS, VALUES)]
        return LayerInfo(keys.kind, keys.heads, keys.head_dim, values.head_dim, cache.window, (), *coded)

    return tuple(describe(cache) for cache in cache_map.empty_caches(model))


def _stream(codecs: CodecPlan, stream: Stream) -> StreamInfo:
    codec, finding = codecs.of_stream(stream), codecs.findings.get(stream)
    name = codec.identity.partition("-")[0]
    told = (finding.loss, finding.reason) if finding is not None else (None, "")
    return StreamInfo(f"{name}{codec.bits}" if name else "exact", codec.bits, codec.group_size, *told)


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
