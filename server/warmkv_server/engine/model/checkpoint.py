"""From a folder to a model: the files that are meant, the config that is meant, and no weight left out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import LayerNorm, RMSNorm
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_config, load_model

from warmkv_server.engine.model import config_norms, weight_files
from warmkv_server.engine.model.load_progress import LoadProgress, evaluate
from warmkv_server.errors import OperatorError

_SHORT = 300
"""Characters of another library's message that go into ours."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder's model.

    Attributes:
        config: as mlx-lm read it.
        read: the language model's config as transformers has it; empty where it doesn't know the type.
        weights: the files.
    """

    model: Any
    config: dict[str, Any]
    read: Mapping[str, Any]
    weights: tuple[Path, ...]


def load(folder: Path, progress: LoadProgress) -> Checkpoint:
    """Load a model.

    Args:
        progress: of reading its weights.

    Raises:
        OperatorError: if it isn't whole, isn't known to mlx-lm, or isn't what its config.json says.
    """
    found = weight_files.find(folder)
    try:
        config = load_config(folder)
        read = config_norms.reference(config)
        config = config_norms.normalised(config, read)
        _, arguments = _get_classes(config)
        filled = config_norms.with_defaults(config, read, arguments, found.tensors)
        try:
            model, config = _load_staged(folder, found.paths, filled, progress)
        except ValueError:
            if filled == config:
                raise
            # Where the weights have other shapes, they were made with mlx-lm's own defaults.
            model, config = _load_staged(folder, found.paths, config, progress)
        _check_types(model)
    except OperatorError as error:
        raise OperatorError(f"mlx-lm can't load the model in {folder}: {error}") from error
    except (Exception, SystemExit) as error:  # the module of one class ends the process where a package is missing
        raise OperatorError(f"mlx-lm can't load the model in {folder}: {_told(error, config=folder)}") from error
    return Checkpoint(model, config, read, found.paths)


def _load_staged(
    folder: Path, weights: tuple[Path, ...], config: dict[str, Any], progress: LoadProgress
) -> tuple[Any, dict[str, Any]]:
    """Have mlx-lm load a folder of links that has these files and no others."""
    with tempfile.TemporaryDirectory(prefix="warmkv-model-") as name:
        staged = Path(name)
        (staged / "config.json").write_text(json.dumps(config))
        for number, path in enumerate(weights):
            (staged / f"model-{number:05}.safetensors").symlink_to(path.resolve())
        if (more := folder / "hf_quant_config.json").is_file():
            (staged / more.name).symlink_to(more.resolve())
        model, config = cast(tuple[Any, dict[str, Any]], load_model(staged, lazy=True, trust_remote_code=False))
        evaluate(model, "reading the weights", progress)
        return model, config


def _check_types(model: Any) -> None:
    """Refuse integers where the model computes with fractions: weights that were packed and are not unpacked."""
    for name, module in model.named_modules():
        if type(module) in (Linear, Embedding, RMSNorm, LayerNorm):
            for part, array in cast(list[tuple[str, mx.array]], tree_flatten(module.parameters())):
                if not mx.issubdtype(array.dtype, mx.floating):
                    kind = str(array.dtype).removeprefix("mlx.core.")
                    raise OperatorError(
                        f"the weights {name}.{part} are of type {kind}, and config.json says of no quantisation that "
                        "would explain it; take the model unquantised, or quantised by mlx-lm"
                    )


def _told(error: BaseException, config: Path) -> str:
    """One line of what went wrong."""
    if isinstance(error, SystemExit):
        return "its class needs a package that isn't installed"
    if isinstance(error, KeyError):
        return f"{config / 'config.json'} lacks {error}"
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith("Received") and ".scales" in text:
        text = f"the weights are quantised, and config.json has no quantization that says how ({text})"
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"
