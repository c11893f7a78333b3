"""That a model rotates queries and keys as its config.json says.

Some of mlx-lm's classes take `rope_scaling` and never look at it, have a base of their own, or compute a scaling
otherwise than its authors. The modules that were built are compared with what was told, and exchanged where they
differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.positional_encoding import RoPE
from mlx.utils import tree_unflatten
from mlx_lm.models import rope_utils

from warmkv_server.errors import OperatorError

ToldRotation = Mapping[str, Any]

_CLASSES: dict[str, tuple[type, ...]] = {
    "yarn": (rope_utils.YarnRoPE,),
    "llama3": (rope_utils.Llama3RoPE,),
    "longrope": (rope_utils.SuScaledRoPE,),
    "su": (rope_utils.SuScaledRoPE,),
    "dynamic": (rope_utils.DynamicNTKScalingRoPE,),
    "proportional": (rope_utils.ProportionalRoPE,),
}
"""Of rope_utils, for each type of scaling; a class that the model brings itself is left as it is."""


def settle(model: Any, told: Sequence[ToldRotation], positions: int, own_positions: int) -> None:
    """Exchange what the model rotates otherwise than it is told to.

    Args:
        told: as `config_norms.rotations` gives them: one for all layers, or one for each type of layer.
        positions: that will be served.
        own_positions: that the model has, by its config.json.

    Raises:
        OperatorError: if it can't be exchanged.
    """
    built = {name: module for name, module in model.named_modules() if _is_known(module)}
    if not built:
        return
    if len({_key(rotation) for rotation in told}) > 1:
        _check_each(built.values(), told)
        new = {}
    else:
        plain = {module.base for module in built.values() if isinstance(module, RoPE)}
        # Where layers differ and nothing was told of each, the class knows of types of layers.
        new = _exchanged(built, told[0], own_positions) if len(plain) <= 1 else {}
    for name, module in built.items():
        now = new.get(name, module)
        if isinstance(now, rope_utils.DynamicNTKScalingRoPE):
            # Its base grows only behind the model's own positions, which are never served; and it takes no batches.
            new[name] = RoPE(now.dims, now.traditional, now.base)
        for rotation in told:
            _correct(now, rotation, positions)
    if new:
        model.update_modules(tree_unflatten(list(new.items())))


def _is_known(module: Any) -> bool:
    return type(module) is RoPE or any(type(module) in classes for classes in _CLASSES.values())


def _key(rotation: ToldRotation) -> tuple[Any, ...]:
    return rotation["rope_type"], rotation.get("rope_theta"), rotation.get("factor")


def _exchanged(built: Mapping[str, Any], told: ToldRotation, own_positions: int) -> dict[str, Module]:
    """In place of plain rotations that have another base or scaling."""
    kind, theta = told["rope_type"], told.get("rope_theta")
    scaled = kind in _CLASSES
    if scaled and any(type(module) in _CLASSES[kind] for module in built.values()):
        scaled = False  # the model's class knows of it; what it leaves plain is meant to be
    scale = 1 / told["factor"] if kind == "linear" and told.get("factor") else 1.0
    new: dict[str, Module] = {}
    for name, module in built.items():
        if type(module) is not RoPE:
            continue
        base = theta if isinstance(theta, int | float) else module.base
        right = math.isclose(base, module.base) and (kind != "linear" or math.isclose(scale, module.scale))
        if right and not scaled:
            continue
        if kind == "linear" or not scaled:
            new[name] = RoPE(module.dims, module.traditional, base, scale if kind == "linear" else module.scale)
            continue
        try:
            new[name] = rope_utils.initialize_rope(module.dims, base, module.traditional, dict(told), own_positions)
        except (KeyError, ValueError, TypeError) as error:
            raise OperatorError(
                f"config.json scales positions by {kind!r} and lacks what that needs ({error}); complete rope_scaling"
            ) from error
    return new


def _check_each(built: Any, told: Sequence[ToldRotation]) -> None:
    thetas = {float(r["rope_theta"]) for r in told if isinstance(r.get("rope_theta"), int | float)}
    found = {float(module.base) for module in built if type(module) is RoPE}
    kinds = {rotation["rope_type"] for rotation in told} & _CLASSES.keys()
    lacking = {kind for kind in kinds if not any(type(module) in _CLASSES[kind] for module in built)}
    if lacking or (thetas and not found <= thetas):
        raise OperatorError(
            "rope_parameters in config.json gives types of layers rotations of their own "
            f"({', '.join(sorted(map(str, thetas)))}; {', '.join(sorted(lacking)) or 'no scaling'}), which mlx-lm's "
            "class for the model doesn't apply; take another model"
        )


def _correct(module: Any, told: ToldRotation, positions: int) -> None:
    """Compute a scaling as transformers does, where mlx-lm computes another."""
    kind = told["rope_type"]
    if kind == "yarn" and type(module) is rope_utils.YarnRoPE:
        if told.get("truncate") is False:
            module._freqs = _yarn_frequencies(module.dims, told)
        if told.get("attention_factor"):
            module.mscale = float(told["attention_factor"])
    before = told.get("original_max_position_embeddings")
    if kind in ("longrope", "su") and type(module) is rope_utils.SuScaledRoPE and before and positions <= before:
        # mlx-lm takes the factors for long contexts always. Here no context is long.
        frequencies = float(told["rope_theta"]) ** (mx.arange(0, module.dim, 2, dtype=mx.float32) / module.dim)
        module._freqs = mx.array(told["short_factor"], dtype=mx.float32) * frequencies


def _yarn_frequencies(dims: int, told: ToldRotation) -> mx.array:
    """As `YarnRoPE` has them, with ends of the ramp between two frequencies. (Peng et al., arXiv 2309.00071, 3.2.)"""
    base, length, factor = told["rope_theta"], told["original_max_position_embeddings"], told["factor"]

    def place(rotations: float) -> float:
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(place(told.get("beta_fast") or 32), 0)
    high = min(place(told.get("beta_slow") or 1), dims - 1)
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / max(high - low, 0.001), 0, 1)
    plain = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    frequencies: mx.array = 1 / (ramp / (factor * plain) + (1 - ramp) / plain)
    return frequencies
