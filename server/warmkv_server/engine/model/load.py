"""Loading a model, by way of its parts: its folder, weights, adapter, tokenizer and caches. Runs on the MLX thread."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from warmkv_server.contract.kv import PartKind
from warmkv_server.contract.model import LayerInfo, ModelInfo, ModelKind
from warmkv_server.engine.cache.codecs.codec import CodecPlan
from warmkv_server.engine.cache.layout import CacheMap
from warmkv_server.engine.model import (
    adapters,
    calibration_text,
    checkpoint,
    config_norms,
    description,
    device,
    ends,
    random_model,
    rotations,
)
from warmkv_server.engine.model import tokenizer as tokenizers
from warmkv_server.engine.model.calibration import TEXT, TOKENS, refined
from warmkv_server.engine.model.checkpoint import Checkpoint
from warmkv_server.engine.model.choosing import choose, plan_of, say
from warmkv_server.engine.model.constants import VERSION, keep, kept
from warmkv_server.engine.model.cpu_modules import exchange_modules
from warmkv_server.engine.model.digests import digest_files, digest_json
from warmkv_server.engine.model.discover import discover
from warmkv_server.engine.model.load_progress import LoadProgress, evaluate, untold
from warmkv_server.engine.model.locate import BUILT_IN, locate
from warmkv_server.engine.model.positions import context_limit as limit_of
from warmkv_server.engine.model.runner import ModelRunner
from warmkv_server.engine.output.answer_text import Spelling
from warmkv_server.engine.output.sampling import Choosable
from warmkv_server.errors import OperatorError
from warmkv_server.platform import blas
from warmkv_server.text import template_file
from warmkv_server.text.loading import template_of
from warmkv_server.text.task import TokenizerSource

log = logging.getLogger(__name__)

__all__ = ["BUILT_IN", "LayerInfo", "LoadedModel", "ModelInfo", "ModelKind", "load"]


@dataclass
class LoadedModel:
    """A model ready to run on this thread."""

    runner: ModelRunner
    tokenizer: TokenizerWrapper
    cache_map: CacheMap
    info: ModelInfo
    choosable: Choosable
    spelling: Spelling

    @property
    def model(self) -> Any:
        """mlx-lm's, for who wants to know what it is made of."""
        return self.runner.model


def load(
    spec: str,
    *,
    adapter: str | None,
    codecs: CodecPlan,
    context_limit: int | None,
    chat_template: Path | None = None,
    constants: Path | None = None,
    tokenizer_found: Callable[[TokenizerSource], object] = lambda _: None,
    progress: LoadProgress = untold,
) -> LoadedModel:
    """Load a model and find out how its caches are kept.

    Args:
        spec: `builtin:NAME`, `random:SHAPE`, a folder, or `ORG/NAME[@REVISION]` on the hub.
        adapter: folder of a LoRA adapter, or None.
        codecs: of the KV.
        context_limit: positions to serve, at most the model's own; None for all.
        chat_template: a file of one, in place of the model's own. The KV of tokens is no other with it, so that it
            isn't in the fingerprint.
        constants: folder that keeps what codecs need to know of models; None to find it out anew.
        tokenizer_found: told what the tokenizer is made of, once it is known to load.
        progress: told how far it is with the weights.

    Raises:
        OperatorError: with what is wrong and what to do.
    """
    given = template_file.read(chat_template) if chat_template is not None else None
    kind, folder = locate(spec)
    if kind is ModelKind.RANDOM:
        model, config = random_model.build(spec.removeprefix("random:"))
        found = Checkpoint(model, config, {}, ())
        folder = BUILT_IN / "tiny"  # of the tokenizer
        # They are a function of the shape, the seed, MLX and the device. Hashing gigabytes would also leave them in
        # host memory, from where a CUDA device reads them at a fraction of its own memory's speed.
        weights_digest = digest_json([config, random_model.SEED, importlib.metadata.version("mlx"), device.describe()])
    else:
        found = checkpoint.load(folder, progress)
        model, config = found.model, found.config
        weights_digest = digest_files(found.weights, partial(progress, "checking the weights"))
    implementation = _sources(model)
    adapter_digest = ""
    if adapter is not None:
        model, adapter_digest = adapters.put_on(model, adapter)
    text_config = config_norms.text_config(config)
    own_limit = limit_of(text_config, found.read, model, None)
    limit = limit_of(text_config, found.read, model, context_limit)
    if kind is not ModelKind.RANDOM:
        rotations.settle(model, config_norms.rotations(config, found.read), limit, own_limit)
    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        # 16-bit products don't go through the BLAS: they run at a fiftieth of the speed of 32-bit ones.
        model.set_dtype(mx.float32)
        evaluate(model, "converting the weights", progress)
    tokenizer = tokenizers.load(folder, given)
    vocab_size = int(text_config.get("vocab_size") or found.read.get("vocab_size") or len(tokenizer))
    ended_by = ends.find(folder, config, tokenizer, vocab_size)
    tokenizer.eos_token_ids = {end.token_id for end in ended_by}
    template = template_of(tokenizer)
    tokenizer_found(
        TokenizerSource(
            folder,
            chat_template=template if isinstance(template, str) else None,
            eos_token_ids=sorted(tokenizer.eos_token_ids),
            defaults=getattr(sys.modules[type(model).__module__], "TOKENIZER_DEFAULTS", None),
            vocab_size=vocab_size,
        )
    )
    if on_cpu:
        exchange_modules(model, limit)
    runner = ModelRunner(model)
    dtype = next(str(array.dtype) for _, array in _parameters(model) if mx.issubdtype(array.dtype, mx.floating))
    fields = {
        "weights": weights_digest,
        "adapter": adapter_digest,
        "implementation": digest_files(implementation),
        "config": digest_json(config),
        "tokenizer": digest_files(tokenizers.files(folder)),
        "dtype": dtype.removeprefix("mlx.core."),
        "rope": digest_json({k: v for k, v in text_config.items() if k.startswith("rope")}),
    }

    cache_map = _caches(runner, codecs, _Text(tokenizer, vocab_size, limit), spec, fields, constants)
    codecs = cache_map.codecs
    fields |= codecs.fingerprint_fields()
    info = ModelInfo(
        model_id=spec,
        kind=kind,
        weights_digest=weights_digest,
        device=device.describe(),
        blas=blas.describe() if on_cpu else "",
        context_limit=limit,
        vocab_size=vocab_size,
        layers=description.layers(model, cache_map),
        kv_bits=codecs.bits,
        kv_group_size=codecs.group_size,
        kv_bytes_per_token=cache_map.layout.nbytes(PartKind.APPEND),
        layout=cache_map.layout,
        fingerprint_fields=fields,
        sampling_defaults=description.sampling_defaults(folder if kind is not ModelKind.RANDOM else None),
        ends=ended_by,
        chat_template_digest=digest_json(template) if template is not None else "",
        versions={name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "transformers")},
    )
    return LoadedModel(runner, tokenizer, cache_map, info, Choosable.of(tokenizer, vocab_size), Spelling(tokenizer))


def _sources(model: Any) -> list[Path]:
    """mlx-lm's files that the model is implemented in: another version of one may compute another KV."""
    names = {type(module).__module__ for module in model.modules()}
    return sorted(Path(str(sys.modules[name].__file__)) for name in names if name.startswith("mlx_lm."))


def recoded(loaded: LoadedModel, codecs: CodecPlan) -> LoadedModel:
    """The same model with its KV coded in another way, whatever that loses. Its `info` stays as it was."""
    if codecs.asked is not None:
        text = _Text(loaded.tokenizer, loaded.info.vocab_size, loaded.info.context_limit)
        codecs = _made(loaded.runner, codecs, text, {}, None)
    return replace(loaded, cache_map=discover(loaded.runner, codecs))


@dataclass(frozen=True)
class _Text:
    """What a model can be tried on."""

    tokenizer: TokenizerWrapper
    vocab_size: int
    positions: int

    def tokens(self, said: str) -> list[int]:
        found = self.tokenizer.encode(said, add_special_tokens=False)
        return [token for token in found if token < self.vocab_size][: self.positions]


def _caches(
    runner: ModelRunner, codecs: CodecPlan, text: _Text, spec: str, fields: Mapping[str, str], folder: Path | None
) -> CacheMap:
    """How the KV is kept, in the codecs that were asked for or in others that do for the model."""
    try:
        if codecs.asked is not None:
            made = _made(runner, codecs, text, fields, folder)
            say(made, spec)
            return discover(runner, made)
        found = discover(runner, codecs)  # says what is wrong with a codec that doesn't fit at all
        finer = refined(runner, codecs, text.tokens(TEXT)[:TOKENS])
        return found if finer is codecs else discover(runner, finer)
    except OperatorError:
        raise
    except (
        Exception
    ) as error:  # the model's first step: a kernel that the device lacks, a config that contradicts itself
        told = " ".join(str(error).split()) or type(error).__name__
        raise OperatorError(
            f"the model {spec} can't compute a token on this device ({device.describe()}): {told}; take another model"
        ) from error


def _made(
    runner: ModelRunner, codecs: CodecPlan, text: _Text, fields: Mapping[str, str], folder: Path | None
) -> CodecPlan:
    """The codecs that were asked for, as the model needs them: as they were made before, or new."""
    asked, group_size = codecs.asked, codecs.group_size
    assert asked is not None
    key = digest_json([fields, str(asked), group_size, calibration_text.TEXT, VERSION])
    found = kept(folder, key) if folder is not None else None
    if found is None:
        log.info("looking at what the model computes of a text, to code its KV as %s", asked)
        tokens = text.tokens(calibration_text.TEXT)
        found = choose(runner, asked, group_size, tokens, text.tokenizer.bos_token_id, text.positions)
        if folder is not None:
            found = keep(folder, key, found)
    return plan_of(found, runner.model, asked, group_size, text.positions)


def _parameters(model: Any) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
