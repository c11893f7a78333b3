"""Adapters: what was fine-tuned is put on the model whole, or refused.

mlx-lm's own are put on by mlx-lm. PEFT's LoRA, which is what is published, has the same matrices under other names,
transposed, with a scale that follows from `lora_alpha`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load_adapters

from warmkv_server.engine.model.digests import digest_files
from warmkv_server.errors import OperatorError

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
_HOMES = ("", "language_model.", "model.")
"""What mlx-lm's classes put before a module's name in transformers."""
_RESIDUAL = ("pissa", "olora", "corda", "loftq")
"""Starts of `init_lora_weights` with which the base model's weights were changed too."""
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Settings of PEFT's LoRA that make it more than two matrices for each module."""


def put_on(model: Any, adapter: str) -> tuple[Any, str]:
    """The model with the adapter, and the adapter's digest.

    Raises:
        OperatorError: if it doesn't fit, in part or at all.
    """
    folder = Path(adapter)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        if "peft_type" in config:
            _put_on_peft(model, folder, config)
        else:
            model = load_adapters(model, adapter)
            _check_whole(model, folder, config)
    except OperatorError as error:
        raise OperatorError(f"the adapter in {adapter} can't be put on this model: {error}") from error
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise OperatorError(f"the adapter in {adapter} can't be put on this model: {text}") from error
    model.eval()
    return model, digest_files(sorted(p for p in folder.iterdir() if p.is_file()))


def _check_whole(model: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """A matrix that the file lacks would be a random one."""
    if config.get("fine_tune_type", "lora") == "full":
        return
    weights = cast(dict[str, mx.array], mx.load(str(folder / "adapters.safetensors")))
    for name, _ in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())):
        if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b") and name not in weights:
            raise OperatorError(f"adapters.safetensors lacks {name}; is it whole?")


def _put_on_peft(model: Any, folder: Path, config: Mapping[str, Any]) -> None:
    _check_peft(folder, config)
    halves = _peft_matrices(folder)
    modules = dict(model.named_modules())
    made = []
    for name, pair in halves.items():
        path = _home(name, modules)
        made.append((path, _lora(name, modules[path], pair["A"], pair["B"], config)))
    model.update_modules(tree_unflatten(made))
    mx.eval(model.parameters())


def _check_peft(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config["peft_type"]
    if kind != "LORA":
        raise OperatorError(f"it is of PEFT's type {kind}, and only LORA is served; merge it into the model with PEFT")
    extra = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        extra.append("bias")
    if str(config.get("init_lora_weights")).lower().startswith(_RESIDUAL):
        extra.append("init_lora_weights")
    if extra:
        raise OperatorError(
            f"it is in PEFT's format with {', '.join(extra)}, which is not served; merge it into the model with PEFT"
        )
    if not (folder / _WEIGHTS).is_file():
        raise OperatorError(f"it is in PEFT's format and has no {_WEIGHTS}; save it as safetensors")


def _peft_matrices(folder: Path) -> dict[str, dict[str, mx.array]]:
    """A, (rank, inputs), and B, (outputs, rank), of every module."""
    halves: dict[str, dict[str, mx.array]] = {}
    for name, array in cast(dict[str, mx.array], mx.load(str(folder / _WEIGHTS))).items():
        match = _MATRIX.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise OperatorError(f"{_WEIGHTS} of PEFT's format has {name}, which is no LoRA matrix of a linear layer")
        halves.setdefault(match[1], {})[match[2]] = array
    if not halves:
        raise OperatorError(f"{_WEIGHTS} of PEFT's format has no matrices")
    for name, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise OperatorError(f"{_WEIGHTS} of PEFT's format has one LoRA matrix of {name} and not the other")
    return halves


def _home(name: str, modules: Mapping[str, Any]) -> str:
    """The name of the model's module that transformers calls so."""
    plain = name.removeprefix("transformer.") if name.startswith("transformer.") else name
    candidates = [f"{prefix}{plain}" for prefix in _HOMES]
    candidates.append(re.sub(r"^model\.language_model\.", "language_model.model.", name))
    for candidate in candidates:
        if isinstance(modules.get(candidate), Linear | QuantizedLinear):
            return candidate
    raise OperatorError(
        f"it is in PEFT's format and changes {name}, which is no linear layer of the model as mlx-lm has it; merge it "
        "into the model with PEFT"
    )


def _lora(name: str, linear: Any, a: mx.array, b: mx.array, config: Mapping[str, Any]) -> LoRALinear:
    """The layer with its matrices.

    Args:
        a: (rank, inputs).
        b: (outputs, rank).
    """
    rank = int(_of_module(config.get("rank_pattern"), name, config["r"]))
    alpha = float(_of_module(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    lora: LoRALinear = LoRALinear.from_base(linear, r=rank, scale=scale)
    if lora.lora_a.shape != a.T.shape or lora.lora_b.shape != b.T.shape:
        raise OperatorError(
            f"PEFT's LoRA matrices of {name} are of shapes {tuple(a.shape)} and {tuple(b.shape)}, and the model wants "
            f"{lora.lora_a.T.shape} and {lora.lora_b.T.shape}; it was made for another model, or of another rank"
        )
    dtype = linear.weight.dtype if mx.issubdtype(linear.weight.dtype, mx.floating) else linear.scales.dtype
    dtype = dtype if mx.issubdtype(dtype, mx.floating) else a.dtype
    lora.lora_a, lora.lora_b = mx.contiguous(a.T).astype(dtype), mx.contiguous(b.T).astype(dtype)
    return lora


def _of_module(pattern: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """PEFT's rule: the first key that the module's name ends with, at a dot, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise
