"""A config.json as mlx-lm's classes read it, whatever wrote it.

mlx-lm's classes read the names of earlier transformers, and have defaults of their own. So a config.json in which
transformers 5 nested the rotation (`rope_parameters`), or left out what it has a default for, becomes another model
without a word. transformers' own reading of the same file is the reference here, where it knows the model's type.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from warmkv_server.errors import OperatorError

log = logging.getLogger(__name__)

_THETAS = {
    "full": ("rope_theta", "rotary_emb_base"),
    "sliding": ("rope_local_base_freq", "swa_rope_theta", "rope_local_theta"),
}
"""What mlx-lm's classes call the base of the rotation, by the attention that it is for."""
_PARTIAL = ("partial_rotary_factor", "rotary_pct")
_KNOWN_METHODS = ("awq", "bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8")

Config = dict[str, Any]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model: all of it, or `text_config` in a multimodal model's."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and nested else config


def reference(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What transformers makes of the language model's config, with all its defaults; empty if it doesn't know the type.

    Positions are under `max_position_embeddings` whatever the model's own name for them, rotations under
    `rope_parameters`, flat or by type of layer.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging as noise

    text = dict(text_config(config))
    kind = text.get("model_type") or config.get("model_type")
    if not isinstance(kind, str):
        return {}
    before = noise.get_verbosity()
    noise.set_verbosity(logging.CRITICAL)
    try:
        read = CONFIG_MAPPING[kind].from_dict(text)
        values: Config = read.to_dict()
        for name, own in (getattr(read, "attribute_map", None) or {}).items():
            if own in values:
                values.setdefault(name, values[own])
    except KeyError:
        return {}
    except Exception as error:  # its checks are its own; mlx-lm may take what it refuses
        log.info("transformers can't read this config.json: %s", error)
        return {}
    finally:
        noise.set_verbosity(before)
    return values


def normalised(config: Mapping[str, Any], read: Mapping[str, Any]) -> Config:
    """The config with rotation and quantisation under the names that mlx-lm's classes read.

    Args:
        config: as in config.json.
        read: its `reference`.

    Raises:
        OperatorError: for a quantisation that mlx-lm doesn't know.
    """
    made = dict(config)
    _name_quantisation(made)
    text = text_config(made)
    if rotation := text.get("rope_parameters") or {}:
        if not isinstance(rotation, Mapping):
            raise OperatorError("rope_parameters in config.json is not an object; fetch the file again")
        named = {**text, **_rotation_names(read.get("rope_parameters") or rotation, text)}
    else:
        named = {**text, **_original_length(text)}
    if text is made:
        return named
    return made | {"text_config": named}


def with_defaults(
    config: Mapping[str, Any], read: Mapping[str, Any], arguments: type, tensors: Mapping[str, Any]
) -> Config:
    """The config with what it leaves out as transformers has it, where mlx-lm's class would have it otherwise.

    Args:
        arguments: the class that mlx-lm reads the config with.
        tensors: of the weights, by name.
    """
    made = dict(config)
    if text_config(config) is config:
        for name, parameter in inspect.signature(arguments).parameters.items():
            value, default = read.get(name), parameter.default
            if name in config or value is None or default is None or name in ("model_type", "tie_word_embeddings"):
                continue
            if (isinstance(default, bool | int | float | str) and default != value) or default is parameter.empty:
                made[name] = value
    # Weights of a last product of their own are dropped by classes that take the embeddings for it by default.
    if "tie_word_embeddings" not in config:
        own = any(name.endswith("lm_head.weight") for name in tensors)
        tied = bool(read.get("tie_word_embeddings"))
        if own or tied:
            made["tie_word_embeddings"] = tied
    return made


def rotations(config: Mapping[str, Any], read: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotations that the language model's layers are to have: one for all, or one for each type of layer.

    Each has `rope_theta` (None or absent: not told) and `rope_type`, by transformers' reading, or by the names in
    config.json where it doesn't know the model.
    """
    text = text_config(config)
    told = read.get("rope_parameters") or text.get("rope_parameters")
    if isinstance(told, Mapping) and told:
        nested = [each for each in told.values() if isinstance(each, Mapping)]
        return [_typed(each) for each in nested or [told]]
    scaling = text.get("rope_scaling")
    return [_typed({"rope_theta": None, **(scaling if isinstance(scaling, Mapping) else {})})]


def _typed(rotation: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = rotation.get("rope_type") or rotation.get("type") or "default"
    return {**rotation, "rope_type": kind, "type": kind}


def _rotation_names(told: Mapping[str, Any], text: Mapping[str, Any]) -> Config:
    """`rope_parameters`, flat or by type of layer, under the older names."""
    nested = {name: each for name, each in told.items() if isinstance(each, Mapping)}
    full = _typed(nested.get("full_attention") or next(iter(nested.values()), told))
    local = _typed(nested.get("sliding_attention") or full)
    named: Config = {}
    for rotation, names in ((full, _THETAS["full"]), (local, _THETAS["sliding"])):
        if rotation.get("rope_theta") is not None:
            named |= dict.fromkeys(names, rotation["rope_theta"])
    if full.get("partial_rotary_factor") is not None:
        named |= dict.fromkeys(_PARTIAL, full["partial_rotary_factor"])
    if full["rope_type"] != "default" and not text.get("rope_scaling"):
        named["rope_scaling"] = dict(full)
    return named | _original_length({**text, **named})


def _original_length(text: Mapping[str, Any]) -> Config:
    """The length before scaling, which is the model's own where the scaling doesn't tell it."""
    scaling, length = text.get("rope_scaling"), text.get("max_position_embeddings")
    if not isinstance(scaling, Mapping) or scaling.get("original_max_position_embeddings"):
        return {}
    before = text.get("original_max_position_embeddings") or length
    if _typed(scaling)["rope_type"] not in ("yarn", "llama3", "longrope") or not before:
        return {}
    return {"rope_scaling": {**scaling, "original_max_position_embeddings": before}}


def _name_quantisation(config: Config) -> None:
    told = config.get("quantization_config") or text_config(config).get("quantization_config")
    if config.get("quantization") is not None or not isinstance(told, Mapping):
        return
    method = told.get("quant_method")
    if method is None and {"bits", "group_size"} <= told.keys():
        config["quantization"] = dict(told)  # mlx-lm's own, under the other of its two names
    elif method not in _KNOWN_METHODS:
        raise OperatorError(
            f"the weights are quantised by {method or 'an unnamed method'} (quantization_config in config.json), which "
            "mlx-lm can't read; take the model unquantised, or quantised by mlx-lm"
        )
