"""Finding, loading and describing a model. Runs on the MLX thread."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import xxhash
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, load_adapters, load_model, load_tokenizer

from warmkv_server import blas
from warmkv_server.engine import device, random_model
from warmkv_server.engine.codec import Codec
from warmkv_server.engine.cpu_modules import exchange_modules
from warmkv_server.engine.layout import CacheMap, discover, empty_caches
from warmkv_server.engine.text_task import TokenizerSource
from warmkv_server.engine.types import Sampling
from warmkv_server.errors import OperatorError
from warmkv_server.kv.types import KVLayout, PartKind

BUILT_IN = Path(__file__).parent.parent / "models"
_HUB_PATTERNS = [pattern for pattern in DEFAULT_ALLOW_PATTERNS if not pattern.endswith(".py")]


class ModelKind(StrEnum):
    BUILT_IN = "built_in"
    LOCAL = "local"
    HUB = "hub"
    RANDOM = "random"
    """Random weights: noise, for tests and benchmarks of geometry."""


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
    eos_token_ids: frozenset[int]
    has_chat_template: bool
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass
class LoadedModel:
    """A model ready to run on this thread."""

    model: Any
    tokenizer: TokenizerWrapper
    cache_map: CacheMap
    info: ModelInfo

    def empty_caches(self) -> list[Any]:
        return self.cache_map.empty_caches(self.model)


def load(
    spec: str,
    *,
    adapter: str | None,
    codec: Codec,
    context_limit: int | None,
    tokenizer_found: Callable[[TokenizerSource], object] = lambda _: None,
) -> LoadedModel:
    """Load a model and find out how its caches are kept.

    Args:
        spec: `builtin:NAME`, `random:SHAPE`, a folder, or `ORG/NAME[@REVISION]` on the hub.
        adapter: folder of a LoRA adapter, or None.
        context_limit: positions to serve, at most the model's own; None for all.
        tokenizer_found: told what the tokenizer is made of, as soon as that is known.

    Raises:
        OperatorError: with what is wrong and what to do.
    """
    kind, folder = _locate(spec)
    is_random = kind is ModelKind.RANDOM
    model, config = random_model.build(spec.removeprefix("random:")) if is_random else _load_folder(folder)
    tokenizer_folder = BUILT_IN / "tiny" if is_random else folder
    text_config = config.get("text_config") or config
    tokenizer_found(
        TokenizerSource(
            tokenizer_folder,
            eos_token_ids=config.get("eos_token_id"),
            defaults=None if is_random else getattr(sys.modules[type(model).__module__], "TOKENIZER_DEFAULTS", None),
            vocab_size=text_config.get("vocab_size"),
        )
    )
    if is_random:
        # They are a function of the shape, the seed, MLX and the device. Hashing gigabytes would also leave them in
        # host memory, from where a CUDA device reads them at a fraction of its own memory's speed.
        weights_digest = _digest_json([config, random_model.SEED, importlib.metadata.version("mlx"), device.describe()])
    else:
        weights_digest = _digest_files(sorted(folder.glob("model*.safetensors")))
    adapter_digest = ""
    if adapter is not None:
        model, adapter_digest = _adapt(model, adapter)
    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        # 16-bit products don't go through the BLAS: they run at a fiftieth of the speed of 32-bit ones.
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    try:
        tokenizer = load_tokenizer(tokenizer_folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        raise OperatorError(f"no tokenizer could be loaded from {tokenizer_folder}: {error}") from error
    vocab_size = int(text_config.get("vocab_size") or len(tokenizer))
    limit = _context_limit(text_config, context_limit)
    if on_cpu:
        exchange_modules(model, limit)
    cache_map = discover(model, codec)
    dtype = next(str(array.dtype) for _, array in _parameters(model) if mx.issubdtype(array.dtype, mx.floating))
    fields = {
        "weights": weights_digest,
        "adapter": adapter_digest,
        "config": _digest_json(config),
        "tokenizer": _digest_files(_tokenizer_files(tokenizer_folder)),
        "kv_bits": str(codec.bits),
        "kv_group_size": str(codec.group_size if codec.bits else 0),
        "dtype": dtype.removeprefix("mlx.core."),
        "rope": _digest_json({k: v for k, v in text_config.items() if k.startswith("rope")}),
    }
    info = ModelInfo(
        model_id=spec,
        kind=kind,
        weights_digest=weights_digest,
        device=device.describe(),
        blas=blas.describe() if on_cpu else "",
        context_limit=limit,
        vocab_size=vocab_size,
        layers=_layers(model, cache_map),
        kv_bits=codec.bits,
        kv_group_size=codec.group_size if codec.bits else 0,
        kv_bytes_per_token=cache_map.layout.nbytes(PartKind.APPEND),
        layout=cache_map.layout,
        fingerprint_fields=fields,
        sampling_defaults=_sampling_defaults(folder if kind is not ModelKind.RANDOM else None),
        eos_token_ids=frozenset(tokenizer.eos_token_ids),
        has_chat_template=bool(tokenizer.has_chat_template),
        versions={name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "transformers")},
    )
    return LoadedModel(model, tokenizer, cache_map, info)


def _locate(spec: str) -> tuple[ModelKind, Path]:
    scheme, _, name = spec.partition(":")
    if scheme == "builtin":
        folder = BUILT_IN / name
        if not (folder / "config.json").is_file():
            raise OperatorError(f"there is no built-in model {name!r}; the built-in model is builtin:tiny")
        return ModelKind.BUILT_IN, folder
    if scheme == "random":
        return ModelKind.RANDOM, Path()
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise OperatorError(f"the folder {folder} has no config.json; --model takes a folder in mlx-lm's layout")
        return ModelKind.LOCAL, folder
    repo, _, revision = spec.partition("@")
    if repo.count("/") != 1 or spec.startswith(("/", ".", "~")):
        raise OperatorError(
            f"no model at {spec!r}: give builtin:tiny, an existing folder, or ORG/NAME[@REVISION] of a hub"
        )
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(repo, revision=revision or None, allow_patterns=_HUB_PATTERNS)
    except Exception as error:
        summary = (str(error).splitlines() or [type(error).__name__])[0]
        raise OperatorError(
            f"the model {spec!r} could not be fetched from the hub ({summary}); "
            "check the name and the network, or give a local folder"
        ) from error
    return ModelKind.HUB, Path(path)


def _load_folder(folder: Path) -> tuple[Any, dict[str, Any]]:
    try:
        model, config = load_model(folder, trust_remote_code=False)
    except FileNotFoundError as error:
        raise OperatorError(f"the folder {folder} has no model*.safetensors; is the download complete?") from error
    except Exception as error:
        raise OperatorError(f"mlx-lm can't load the model in {folder}: {error}") from error
    return model, config


def _adapt(model: Any, adapter: str) -> tuple[Any, str]:
    try:
        adapted = load_adapters(model, adapter)
    except Exception as error:
        raise OperatorError(f"the adapter in {adapter} can't be put on this model: {error}") from error
    adapted.eval()
    return adapted, _digest_files(sorted(p for p in Path(adapter).iterdir() if p.is_file()))


def _context_limit(config: Mapping[str, Any], wanted: int | None) -> int:
    own = int(config.get("max_position_embeddings") or 0)
    if wanted is None:
        return own or 32768
    if own and wanted > own:
        raise OperatorError(f"--context-limit {wanted} is more than the model's {own} positions; give at most {own}")
    return wanted


def _layers(model: Any, cache_map: CacheMap) -> tuple[LayerInfo, ...]:
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


def _sampling_defaults(folder: Path | None) -> Sampling:
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


def _tokenizer_files(folder: Path) -> list[Path]:
    patterns = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "*.tiktoken")
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _digest_files(paths: Sequence[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def _parameters(model: Any) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))


def _digest_json(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
