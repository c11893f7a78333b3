"""Running the model: the one place that calls it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from warmkv_server.engine.cache import caches as kinds
from warmkv_server.engine.model.step_plan import StepPlan, Wanted

log = logging.getLogger(__name__)

_WRAPPERS = ("language_model",)
_BODIES = ("model", "transformer", "backbone")
"""What mlx-lm's classes call the part of them that gives hidden states."""


class ModelRunner:
    """Carries out plans on a model's caches. On the MLX thread; everything it gives is lazy.

    Where nothing of a step but its KV is evaluated, its logits are never computed.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, plan: StepPlan, caches: Sequence[Any]) -> None:
        """Have the caches take a chunk's tokens, and forget what rows are padded with beyond the longest one's."""
        self._feed(self.model, plan, caches)

    def decode(self, plan: StepPlan, caches: Sequence[Any], chosen: mx.array | None = None) -> mx.array:
        """Feed each row a token.

        Args:
            chosen: the tokens, (rows,), of a plan whose rows don't have them.

        Returns the logits behind them, (rows, vocabulary).
        """
        if chosen is None:
            return self._feed(self.model, plan, caches)[:, 0]
        log.debug("%s", plan)
        _tell(plan, caches)
        inputs = chosen[:, None]
        logits: mx.array = self.model(inputs if plan.fed == 1 else mx.repeat(inputs, plan.fed, axis=1), cache=caches)
        return logits[:, 0]

    def verify(self, plan: StepPlan, caches: Sequence[Any]) -> mx.array:
        """Feed the only row a token and a guess. Returns the logits behind each, (tokens, vocabulary)."""
        return self._feed(self.model, plan, caches)[0]

    def score(self, plan: StepPlan, caches: Sequence[Any]) -> mx.array:
        """Have the caches take a chunk of the only row. Returns the logits behind each token, (tokens, vocabulary)."""
        return self._feed(self.model, plan, caches)[0, : plan.rows[0].length]

    def probe(self, plan: StepPlan, caches: Sequence[Any]) -> mx.array:
        """Run a step to see what comes of it.

        Returns the logits of all that was fed, (rows, tokens, vocabulary), or the hidden states that logits are made
        of, (rows, tokens, width).

        Raises:
            LookupError: if hidden states are wanted of a class without a part that is known to give them.
        """
        return self._feed(_body(self.model) if plan.wanted is Wanted.HIDDEN else self.model, plan, caches)

    def _feed(self, part: Callable[..., mx.array], plan: StepPlan, caches: Sequence[Any]) -> mx.array:
        """Feed tokens that the plan has, padded behind their ends."""
        log.debug("%s", plan)
        _tell(plan, caches)
        prompts = [row.tokens or () for row in plan.rows]
        found = part(mx.array([[*tokens, *[0] * (plan.fed - len(tokens))] for tokens in prompts]), cache=caches)
        if padding := plan.fed - max(map(len, prompts)):
            for cache in caches:
                cache.cut(padding)
        return found


def _tell(plan: StepPlan, caches: Sequence[Any]) -> None:
    """Have the caches of a batch know the positions at which its rows are fed."""
    if len(plan.rows) > 1:
        starts = tuple([row.start for row in plan.rows])
        for leaf in kinds.token_leaves(caches).values():
            leaf.starts = starts


def _body(model: Any) -> Any:
    for name in _WRAPPERS:
        model = model.get(name, model)
    for name in _BODIES:
        if callable(body := model.get(name)):
            return body
    raise LookupError(f"{type(model).__module__} has no part that is known to give hidden states")
