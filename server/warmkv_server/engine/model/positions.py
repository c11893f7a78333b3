"""How many positions a model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx.nn.layers.embedding import Embedding

from warmkv_server.errors import OperatorError

_UNTOLD = 32768
"""Positions of a model whose config.json doesn't say."""

_NAMES = (
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "max_seq_len",
    "max_context_length",
    "context_length",
    "model_max_length",
    "max_target_positions",
)
"""Names other than `max_position_embeddings`; where there are several, the least counts."""

_TABLES = ("wpe", "position_embeddings", "embed_positions", "position_embedding")
"""Names of embeddings of positions."""


def context_limit(config: Mapping[str, Any], read: Mapping[str, Any], model: Any, wanted: int | None) -> int:
    """Positions to serve.

    Args:
        config: of the language model.
        read: the same as transformers has it; may be empty.
        wanted: by the operator; None for all.

    Raises:
        OperatorError: if the model has fewer than are wanted.
    """
    own = _scaled(config, _told(config))
    if table := _table(model):
        own = min(own, table) if own else table
    if wanted is None:
        return own or _scaled(config, _told(read)) or _UNTOLD
    if own and wanted > own:
        raise OperatorError(f"--context-limit {wanted} is more than the model's {own} positions; give at most {own}")
    return wanted


def _told(config: Mapping[str, Any]) -> int:
    if own := _count(config.get("max_position_embeddings")):
        return own
    return min(filter(None, (_count(config.get(name)) for name in _NAMES)), default=0)


def _count(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e15 else 0


def _scaled(config: Mapping[str, Any], told: int) -> int:
    """With rotations scaled to longer contexts, where the limit was left as it was before scaling.

    By transformers' meaning of the fields: `factor` times the original length can be handled. YaRN's factor is that
    ratio itself; the factors of the other two are chosen more freely (Llama 3.2 has 32 for a ratio of 16), so that
    there they count only where nothing else tells the longer limit.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, Mapping) or not told:
        return told
    kind = scaling.get("rope_type") or scaling.get("type")
    before = _count(scaling.get("original_max_position_embeddings")) or told
    factor = scaling.get("factor")
    if not isinstance(factor, int | float) or factor <= 1:
        return told
    if kind == "yarn" or (kind in ("llama3", "longrope") and told <= before):
        return max(told, int(before * factor))
    return told


def _table(model: Any) -> int:
    """Rows of the model's table of learned positions; beyond them there is none. 0 if it has no such table."""
    rows = [
        module.weight.shape[0]
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in _TABLES and isinstance(module, Embedding)
    ]
    return min(rows, default=0)
