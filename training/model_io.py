"""The trained model for evaluation: float32 on this machine, and its losses token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

from . import MODEL

_CHUNK = 512  # tokens computed at once


def read_model(folder: Path = MODEL) -> tuple[Any, Any]:
    """The model with float32 weights, as the server runs it on a CPU, and mlx-lm's tokenizer."""
    model, tokenizer = load(str(folder))[:2]
    model.update(tree_map(lambda weight: weight.astype(mx.float32), model.parameters()))
    mx.eval(model.parameters())
    return model, tokenizer


def token_losses(model: Any, tokens: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Nats of every token but the first, each given all before it: ``(n,)`` to ``(n - 1,)``."""
    cache = make_prompt_cache(model)
    losses = []
    inputs = mx.array(tokens.astype(np.int32))[None]
    for start in range(0, len(tokens) - 1, _CHUNK):
        end = min(start + _CHUNK, len(tokens) - 1)
        logits = model(inputs[:, start:end], cache=cache)
        part = nn.losses.cross_entropy(logits, inputs[:, start + 1 : end + 1], reduction="none")
        mx.eval(part, [layer.state for layer in cache])
        losses.append(np.array(part[0]))
    return cast("npt.NDArray[np.float32]", np.concatenate(losses))
