"""How probable given tokens are."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from warmkv_server.contract.generation import Scored
from warmkv_server.engine.output.sampling import logprobs_of

_LOGITS_BYTES = 64 << 20
"""Of the logits of one step. Log probabilities and what is looked for in them take as much again, a few times."""
_FEWEST = 16
COPIES = 5
"""Arrays of this size that a step takes."""


def scored_at_once(vocab_size: int) -> int:
    """Tokens of a chunk whose logits are all looked at."""
    return max(_FEWEST, _LOGITS_BYTES // (4 * vocab_size))


def score(logits: mx.array, targets: npt.NDArray[np.int32], top: int) -> Scored:
    """Of the tokens that stand behind these logits, (tokens, vocabulary). Waits for them."""
    own = logprobs_of(logits)
    width = own.shape[-1]
    known = np.minimum(targets, width - 1)
    chosen = mx.take_along_axis(own, mx.array(known)[:, None], axis=-1)[:, 0]
    ids = mx.argpartition(-own, kth=max(top, 1) - 1, axis=-1)[:, :top]
    values = mx.take_along_axis(own, ids, axis=-1)
    mx.eval(chosen, ids, values)
    found, likeliest = np.array(values), np.array(ids).astype(np.int32)
    order = np.argsort(-found, axis=-1, kind="stable")
    return Scored(
        targets,
        np.where(targets < width, np.array(chosen), -np.inf).astype(np.float32),
        np.take_along_axis(likeliest, order, axis=-1),
        np.take_along_axis(found, order, axis=-1),
    )
