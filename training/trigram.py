"""The baseline: a trigram model over the same tokens, interpolated as Witten and Bell (1991) do it."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint16]
Counts = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # distinct n-grams as sorted numbers, and how often


class Trigram:
    """Counts of n-grams up to three tokens.

    With c for counts and d for the number of distinct followers,
    P(w | context) = (c(context, w) + d(context) * P(w | shorter context)) / (c(context) + d(context)),
    down to the uniform distribution over the vocabulary.
    """

    def __init__(self, tokens: Tokens, vocab: int) -> None:
        self._vocab = vocab
        self._counts = [_count(_numbers(tokens, order, vocab)) for order in (1, 2, 3)]
        self._contexts = [_contexts(counts, vocab) for counts in self._counts]

    def losses(self, tokens: Tokens) -> npt.NDArray[np.float64]:
        """Nats of every token from the third on: ``(n,)`` to ``(n - 2,)``."""
        probability = np.full(len(tokens) - 2, 1.0 / self._vocab)
        for order in (1, 2, 3):
            grams = _numbers(tokens, order, self._vocab)[3 - order :]
            context = grams // self._vocab
            total, distinct = (_look_up(table, context) for table in self._contexts[order - 1])
            seen = _look_up(self._counts[order - 1], grams)
            known = total > 0
            mixed = (seen + distinct * probability) / np.maximum(total + distinct, 1)
            probability = np.where(known, mixed, probability)
        return cast("npt.NDArray[np.float64]", -np.log(probability))


def _numbers(tokens: Tokens, order: int, vocab: int) -> npt.NDArray[np.int64]:
    """One number for each run of ``order`` tokens."""
    count = len(tokens) - order + 1
    number = np.zeros(count, dtype=np.int64)
    for offset in range(order):
        number = number * vocab + tokens[offset : offset + count]
    return number


def _count(numbers: npt.NDArray[np.int64]) -> Counts:
    values, counts = np.unique(numbers, return_counts=True)
    return values, counts


def _contexts(counts: Counts, vocab: int) -> tuple[Counts, Counts]:
    """For each context: how often it was seen, and how many different tokens followed it."""
    contexts, where = np.unique(counts[0] // vocab, return_inverse=True)
    total = np.bincount(where, weights=counts[1]).astype(np.int64)
    return (contexts, total), (contexts, np.bincount(where).astype(np.int64))


def _look_up(table: Counts, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    keys, values = table
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
