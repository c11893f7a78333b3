"""Which ids may be sampled."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper


class Choosable:
    """The ids that may be sampled: embeddings are often padded, and a padded id has no text.

    Args:
        ids: that the tokenizer has.
        width: of the model's logits, as config.json tells it.

    Attributes:
        count: ids below it may be chosen.
    """

    def __init__(self, ids: Collection[int], width: int) -> None:
        present = {token for token in ids if 0 <= token < width}
        self.count = max(present, default=width - 1) + 1
        holes = [token for token in range(self.count) if token not in present] if present else []
        self._holes: mx.array | None = None
        if holes:
            mask = mx.zeros((self.count,))
            mask[mx.array(holes)] = -mx.inf
            mx.eval(mask)
            self._holes = mask

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper, width: int) -> Choosable:
        return cls(tokenizer.get_vocab().values(), width)

    def __call__(self, logits: mx.array) -> mx.array:
        """Those of these logits, (..., vocabulary), that belong to ids that may be chosen. Lazy."""
        if logits.shape[-1] > self.count:
            logits = logits[..., : self.count]
        return logits if self._holes is None else logits + self._holes.astype(logits.dtype)
