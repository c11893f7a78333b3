"""Training with PyTorch, on a GPU. The weights carry the names that mlx-lm's `llama` class expects."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from .recipe import Plan
from .shape import Shape

Weights = dict[str, torch.Tensor]


def train(
    shape: Shape, plan: Plan, data: Path, out: Path, start: Path | None = None, log: Callable[[str], None] = print
) -> None:
    """Train from the weights in ``start``, or random ones; write ``out``, a safetensors file of 16-bit floats."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(plan.seed)
    weights = read_weights(start, "cuda") if start else initial_weights(shape, "cuda")
    optimizers = _optimizers(weights, plan)
    compiled = torch.compile(loss, dynamic=False)
    started, seen = time.monotonic(), 0
    for step, batch in enumerate(plan.batches(data)):
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * plan.rate_at(step)
        tokens = torch.from_numpy(batch).pin_memory().to("cuda", non_blocking=True).long()
        with torch.autocast("cuda", torch.bfloat16):
            value = compiled(weights, tokens, shape)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), plan.clip)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += tokens.numel()
        if step % 100 == 0 or step == plan.steps - 1:
            took = time.monotonic() - started
            log(f"step {step}/{plan.steps} length {batch.shape[1] - 1} loss {value.item():.4f} "
                f"{seen / took / 1e6:.2f}M tokens/s {took:.0f} s")  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: w.detach().half().cpu().contiguous() for name, w in weights.items()}, out, {"format": "mlx"})


def _optimizers(weights: Weights, plan: Plan) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak learning rates."""
    matrices = [w for name, w in weights.items() if w.ndim == 2 and "embed" not in name]
    others = [w for name, w in weights.items() if w.ndim == 1 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=plan.matrix_rate, momentum=plan.momentum, weight_decay=plan.matrix_decay)
    adam = torch.optim.AdamW(others, lr=plan.vector_rate, betas=plan.betas, weight_decay=0.0, fused=True)
    return [(muon, plan.matrix_rate), (adam, plan.vector_rate)]


def initial_weights(shape: Shape, device: str) -> Weights:
    """Random weights, float32, each with a gradient. Matrices are ``(out, in)``."""
    inner, outer = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    width, hidden = shape.hidden, shape.feed_forward
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, width)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.self_attn.q_proj.weight": (inner, width),
            f"{prefix}.self_attn.k_proj.weight": (outer, width),
            f"{prefix}.self_attn.v_proj.weight": (outer, width),
            f"{prefix}.self_attn.o_proj.weight": (width, inner),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.mlp.gate_proj.weight": (hidden, width),
            f"{prefix}.mlp.up_proj.weight": (hidden, width),
            f"{prefix}.mlp.down_proj.weight": (width, hidden),
        }
    shapes["model.norm.weight"] = (width,)
    weights = {}
    for name, size in shapes.items():
        if len(size) == 1:
            weights[name] = torch.ones(size)
        else:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            weights[name] = torch.randn(size) * (0.02 / (2 * shape.layers) ** 0.5 if last else 0.02)
    return {name: w.to(device).requires_grad_() for name, w in weights.items()}


def read_weights(path: Path, device: str) -> Weights:
    """Weights that ``train`` wrote, as float32, each with a gradient."""
    return {name: w.float().to(device).requires_grad_() for name, w in sorted(load_file(path).items())}


def loss(weights: Weights, tokens: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Mean negative log-likelihood in nats of ``tokens[:, 1:]``; ``tokens`` is ``(rows, length + 1)``."""
    logits = forward(weights, tokens[:, :-1], shape)
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def forward(weights: Weights, tokens: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Logits ``(rows, length, vocab)``."""
    rows, length = tokens.shape
    cos, sin = _rotations(length, shape, tokens.device)
    x = functional.embedding(tokens, weights["model.embed_tokens.weight"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x.float(), (shape.hidden,), weights[name], shape.norm_eps)

    def heads(x: torch.Tensor, name: str, count: int) -> torch.Tensor:
        return functional.linear(x, weights[name]).view(rows, length, count, shape.head_dim).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        h = norm(x, f"{prefix}.input_layernorm.weight")
        q = rotate(heads(h, f"{prefix}.self_attn.q_proj.weight", shape.heads))
        k = rotate(heads(h, f"{prefix}.self_attn.k_proj.weight", shape.kv_heads))
        v = heads(h, f"{prefix}.self_attn.v_proj.weight", shape.kv_heads)
        repeat = shape.heads // shape.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + functional.linear(attended, weights[f"{prefix}.self_attn.o_proj.weight"])
        h = norm(x, f"{prefix}.post_attention_layernorm.weight")
        gated = functional.silu(functional.linear(h, weights[f"{prefix}.mlp.gate_proj.weight"]))
        h = gated * functional.linear(h, weights[f"{prefix}.mlp.up_proj.weight"])
        x = x + functional.linear(h, weights[f"{prefix}.mlp.down_proj.weight"])
    return functional.linear(norm(x, "model.norm.weight"), weights["model.embed_tokens.weight"])


def _rotations(length: int, shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``(length, head_dim / 2)`` of the rotary embedding."""
    half = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * shape.rope_theta**-half
    return angles.cos(), angles.sin()
