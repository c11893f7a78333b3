"""Training with MLX, on a CPU with a fast BLAS or on Apple silicon: the same recipe as with PyTorch, only slower."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from mlx_lm.models import llama

from .recipe import Plan
from .shape import Shape


def train(
    shape: Shape, plan: Plan, data: Path, out: Path, start: Path | None = None, log: Callable[[str], None] = print
) -> list[float]:
    """Train from the weights in ``start``, or random ones; write ``out``, a safetensors file of 16-bit floats.

    Returns the loss of every step.
    """
    mx.random.seed(plan.seed)
    model = initial_model(shape)
    if start:
        model.load_weights(str(start))
        model.update(tree_map(lambda weight: weight.astype(mx.float32), model.parameters()))
    muon = _Muon(plan.matrix_rate, plan.momentum, weight_decay=plan.matrix_decay)
    adam = optimizers.AdamW(plan.vector_rate, list(plan.betas), weight_decay=0.0, bias_correction=True)
    optimizer = optimizers.MultiOptimizer([muon, adam], [lambda name, w: w.ndim == 2 and "embed" not in name])
    loss_and_gradients = nn.utils.value_and_grad(model, loss)
    losses: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(plan.batches(data)):
        muon.learning_rate = plan.matrix_rate * plan.rate_at(step)
        adam.learning_rate = plan.vector_rate * plan.rate_at(step)
        value, gradients = loss_and_gradients(model, mx.array(batch))
        gradients, _ = optimizers.clip_grad_norm(gradients, plan.clip)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state, value)
        losses.append(float(np.array(value)))
        if step % 100 == 0 or step == plan.steps - 1:
            log(f"step {step}/{plan.steps} length {batch.shape[1] - 1} loss {losses[-1]:.4f} "
                f"{time.monotonic() - started:.0f} s")  # fmt: skip
    save(model, out)
    return losses


class _Muon(optimizers.Muon):
    """MLX's Muon, with the weights' decay beside the update instead of inside it, as PyTorch does it."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        decay, self.weight_decay = self.weight_decay, 0.0
        updated: mx.array = super().apply_single(gradient, parameter, state)
        self.weight_decay = decay
        shrunk: mx.array = self.learning_rate * decay * parameter
        return updated - shrunk


def initial_model(shape: Shape) -> llama.Model:
    """Random weights: normal, standard deviation 0.02, less for what adds to the residual stream."""
    model = llama.Model(llama.ModelArgs.from_dict(shape.config()))

    def draw(name: str, weight: mx.array) -> mx.array:
        if weight.ndim == 1:
            return mx.ones_like(weight)
        last = name.endswith(("o_proj.weight", "down_proj.weight"))
        return mx.random.normal(weight.shape) * (0.02 / (2 * shape.layers) ** 0.5 if last else 0.02)

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


def loss(model: llama.Model, tokens: mx.array) -> mx.array:
    """Mean negative log-likelihood in nats of ``tokens[:, 1:]``; ``tokens`` is ``(rows, length + 1)``."""
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def save(model: llama.Model, out: Path) -> None:
    """Write the weights as 16-bit floats, under the names that ``mlx_lm.load`` expects."""
    halves = tree_map(lambda weight: weight.astype(mx.float16), model.parameters())
    out.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out), dict(tree_flatten(halves)), metadata={"format": "mlx"})
