"""Choosing the next token: mlx-lm's samplers and logits processors, with a random stream of each sequence's own."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from typing import cast

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from warmkv_server.contract.generation import Logprobs, Sampling
from warmkv_server.engine.output.constraint import Mask, bias_of

_MASK64 = (1 << 64) - 1


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


class Chooser:
    """Samples for one sequence.

    The draw at a position depends on the seed and the position alone, so that a sequence gives the same tokens in a
    batch and alone, wherever its logits are the same.

    Args:
        choosable: what may be sampled; None for everything.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab_size: int,
        top_logprobs: int,
        choosable: Choosable | None = None,
    ) -> None:
        self._choosable = choosable or Choosable((), vocab_size)
        self.greedy = sampling.temperature == 0
        self.top_logprobs = top_logprobs
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed & _MASK64
        self._draw = make_sampler(
            temp=sampling.temperature,
            top_p=sampling.top_p if sampling.top_p < 1 else 0.0,
            min_p=sampling.min_p,
            top_k=sampling.top_k if sampling.top_k < vocab_size else 0,
        )
        everything = len(prompt) + (1 << 30)
        self._bias = make_logits_processors(logit_bias=dict(sampling.logit_bias) or None)
        self._on_context = make_logits_processors(
            repetition_penalty=sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
            repetition_context_size=everything,
        )
        self._on_answer = make_logits_processors(
            presence_penalty=sampling.presence_penalty or None,
            presence_context_size=everything,
            frequency_penalty=sampling.frequency_penalty or None,
            frequency_context_size=everything,
        )
        self._prompt = prompt
        self.rewind(())

    def rewind(self, answer: Sequence[int]) -> None:
        """Be where it was before the last of these tokens of the answer was fed."""
        before = list(answer[:-1])
        self._context = mx.array([*self._prompt, *before] if self._on_context else [], dtype=mx.uint32)
        self._answer = mx.array(before, dtype=mx.uint32)

    @property
    def plain(self) -> bool:
        """Whether the choice is the largest of the model's own logits and nothing else is reported."""
        return self.greedy and not (self._bias or self._on_context or self._on_answer or self.top_logprobs)

    @property
    def memoryless(self) -> bool:
        """Whether the choice at a position depends on no token but through the logits."""
        return not (self._on_context or self._on_answer)

    def choose_each(self, logits: mx.array, position: int, masks: Sequence[Mask | None] | None = None) -> list[Choice]:
        """Choose from logits of shape (tokens, vocabulary), of a `memoryless` sequence.

        Args:
            position: length of the context that the first of the chosen tokens will follow.
            masks: of what may be chosen at each; None for everything.
        """
        if self.plain:
            logits = constrained(self._choosable(logits), masks)
            best = mx.argmax(logits, axis=-1)
            scores = Scores.of(logits, best)
            return [Choice(best[row : row + 1], scores, row) for row in range(len(logits))]
        each = masks if masks is not None else [None] * len(logits)
        return [self.choose(logits[row : row + 1], position + row, None, each[row]) for row in range(len(logits))]

    def choose(self, logits: mx.array, position: int, last: mx.array | None, mask: Mask | None = None) -> Choice:
        """Choose from the model's logits of shape (1, vocabulary).

        The log-probabilities that go with the choice are the model's own, of these logits before bias and penalties:
        what people compare between requests, score texts and measure certainty with. (vLLM's default too.)

        Args:
            position: length of the context that the token will follow.
            last: the token of the answer that the logits follow, shape (1,); None for the first.
            mask: of what may be chosen; None for everything.
        """
        if last is not None and self._on_answer:
            self._answer = mx.concatenate([self._answer, last.astype(mx.uint32)])
        if last is not None and self._on_context:
            self._context = mx.concatenate([self._context, last.astype(mx.uint32)])
        # Now: the processors write into their logits.
        own = logprobs_of(self._choosable(logits)) if self.top_logprobs else None
        for process in self._bias:
            logits = process(self._answer, logits)
        for process in self._on_context:
            logits = process(self._context, logits)
        for process in self._on_answer:
            logits = process(self._answer, logits)
        logits = self._choosable(logits)  # now: bias and penalties may name any id
        if mask is not None:
            logits = constrained(logits, [mask])
        if self.greedy:
            weighed, token = logits, mx.argmax(logits, axis=-1)
        else:
            # One call of the generator seeds it; what is drawn here touches no other sequence's stream.
            mx.random.seed((self._seed + position * 0x9E3779B97F4A7C15) & _MASK64)
            weighed = logprobs_of(logits)
            token = self._draw(weighed)
        scores = Scores.of(weighed, token)
        if own is None:
            return Choice(token, scores)
        ids = mx.argpartition(-own, kth=self.top_logprobs - 1, axis=-1)[:, : self.top_logprobs]
        return Choice(
            token,
            scores,
            chosen=mx.take_along_axis(own, token[:, None], axis=-1),
            top_ids=ids,
            top=mx.take_along_axis(own, ids, axis=-1),
        )


def constrained(logits: mx.array, masks: Sequence[Mask | None] | None) -> mx.array:
    """Logits, (rows, vocabulary), of which the masked ones are minus infinity. Lazy."""
    return logits if masks is None else logits + bias_of(masks, logits.shape[-1], logits.dtype)


def logprobs_of(logits: mx.array) -> mx.array:
    """In 32 bits. Lazy."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class NotNumbers(Exception):
    """The model's logits are not numbers: nothing can be chosen from them."""


class Scores:
    """The logit or log-probability of each row's chosen token, which tells whether the row's logits are numbers.

    It costs no look at the others: where they are no numbers, neither is the one that was chosen; where they have
    overflowed it is infinite. Read with the tokens, those of all rows at once.
    """

    def __init__(self, values: mx.array) -> None:
        self.values = values
        self._read: list[float] | None = None

    @classmethod
    def of(cls, weighed: mx.array, chosen: mx.array) -> Scores:
        """From what was weighed, (rows, vocabulary), and the choices, (rows,)."""
        return cls(mx.take_along_axis(weighed, chosen[:, None], axis=-1)[:, 0])

    def check(self, row: int) -> None:
        """Wait for the step.

        Raises:
            NotNumbers: if a logit of the row isn't a number.
        """
        if self._read is None:
            self._read = cast(list[float], self.values.tolist())
        if not math.isfinite(self._read[row]):
            raise NotNumbers(f"the chosen token's logit is {self._read[row]}: overflow, or broken weights")


class Choice:
    """A token on its way: lazy until it is read.

    Args:
        scores: of the step that gives it, with its row there; None for a token that is there already.

    Attributes:
        token: shape (1,).
    """

    def __init__(
        self,
        token: mx.array,
        scores: Scores | None = None,
        row: int = 0,
        *,
        chosen: mx.array | None = None,
        top_ids: mx.array | None = None,
        top: mx.array | None = None,
    ) -> None:
        self.token = token
        self._scores = scores
        self._row = row
        self._reported = (chosen, top_ids, top)
        self._value: int | None = None

    @property
    def arrays(self) -> list[mx.array]:
        scores = [self._scores.values] if self._scores is not None else []
        return [self.token, *scores, *(a for a in self._reported if a is not None)]

    @property
    def known(self) -> bool:
        """Whether it was read: reading it again waits for nothing."""
        return self._value is not None

    def read(self) -> int:
        """The token; waits for it."""
        if self._value is None:
            self._value = cast(int, self.token.item())
        return self._value

    def check(self) -> None:
        """Wait for it.

        Raises:
            NotNumbers: if it was chosen from logits that aren't numbers.
        """
        if self._scores is not None:
            self._scores.check(self._row)

    def logprobs(self) -> Logprobs | None:
        """What was asked to be reported; waits for the values."""
        chosen, ids, top = self._reported
        if chosen is None or ids is None or top is None:
            return None
        alternatives = cast(list[int], ids[0].tolist())
        values = cast(list[float], top[0].tolist())
        pairs = sorted(zip(alternatives, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        return Logprobs(self.read(), cast(float, chosen.item()), tuple(pairs))
