"""Speculative decoding by prompt lookup: what a sequence that decodes alone may get from one step of the model.

Agents quote: files they edit, results of tools, their own words. So what followed the latest tokens where they stood
before is a good guess of what follows now (A. Saxena, "Prompt Lookup Decoding", 2023; checking a guess in one step:
Leviathan et al., arXiv 2211.17192), and needs no second model. One step feeds the last token and the guess, and chooses
a token behind each of them. As long as choice and guess are equal, the guess is the answer; the rest is cut off.

A choice depends on its own logits and position only, so that this samples from the same distribution as deciding token
by token; greedy or with a seed it gives the same tokens, wherever rounding doesn't decide. What is guessed depends on
the sequence's tokens and the device, and on no clock: the same request alone takes the same steps.

Where an answer is held to a grammar, what that forces is guessed first, in the tokens that the tokenizer would write it
with. Each choice is made under the grammar's mask: which tokens spell the forced text is still the model's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from warmkv_server.engine.model.load import LoadedModel
from warmkv_server.engine.output.constraint import Mask, RanOut
from warmkv_server.engine.output.sampling import Choice
from warmkv_server.engine.steps.sequence import Sequence as Stream
from warmkv_server.errors import OperatorError

LEAST_MATCH = 3
"""Tokens that must have stood together before. Two of ordinary text often have, and say little about the third."""

MOST_MATCH = 16
"""Tokens compared to find the place that is most alike."""

ALLOWANCE = 0.01
"""Share of the steps that guessing may lose where it never helps."""

START, MOST = 1.0, 4.0
"""Steps that a sequence may lose at once: in the beginning, and after its guesses were good."""

FIRST_GUESS = 3
"""Tokens of a sequence's first guess. A later one has up to twice as many as were right the last time, and one more."""

WAITING = 0.1
"""Steps lost by reading a token before the next one is launched."""

CHECK = {"cpu": 0.5, "gpu": 0.1}
"""What any guess adds to a step, in steps: more than one row is another path through the device's products. On a CPU (2
cores, MKL) this is next to nothing while the cores are free, and two steps while others compute on them."""

ROW = {"cpu": 0.1, "cpu quantised": 0.85, "gpu": 0.25}
"""What each guessed token adds to a step. A CPU computes products with quantised weights row by row. Measured on CPU (2
cores, MKL, 8 rows: 0.06 to 0.1; quantised: 0.85); on a GPU not measured, and meant to be on the safe side."""

ATTENTION = 0.6
"""What each guessed token adds to the part of a step that attends to the context. Measured as above."""


class Lookup:
    """A context, and what followed its last tokens when they stood there before.

    Args:
        tokens: the prompt.
        room: tokens that may follow.
    """

    def __init__(self, tokens: Sequence[int], room: int) -> None:
        self._tokens = np.zeros(len(tokens) + room, np.int32)
        self._tokens[: len(tokens)] = tokens
        self._length = len(tokens)

    def __len__(self) -> int:
        return self._length

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._tokens[self._length] = token
            self._length += 1

    def guess(self, count: int) -> list[int]:
        """The `count` tokens after the longest earlier occurrence of the last ones, the latest of equally long ones.

        Where that runs into the end, it goes on with itself: what repeats is taken to go on repeating. Empty if fewer
        than `LEAST_MATCH` tokens have stood there before.
        """
        tokens = self._tokens[: self._length]
        ends = np.flatnonzero(tokens[:-1] == tokens[-1])
        matched = 1
        while ends.size and matched < MOST_MATCH:
            longer = ends[ends >= matched]
            longer = longer[tokens[longer - matched] == tokens[-1 - matched]]
            if not longer.size:
                break
            ends, matched = longer, matched + 1
        if not ends.size or matched < LEAST_MATCH:
            return []
        return [int(token) for token in np.resize(tokens[ends[-1] + 1 :], count)]


class Purse:
    """How many steps a sequence may still lose by wrong guesses.

    Good guesses fill it, within bounds; each step adds the allowance. So a sequence loses no more than `START` and
    `ALLOWANCE` of its steps, whatever is guessed, as far as a guessed token costs what it is said to.
    """

    def __init__(self) -> None:
        self.steps = START

    def affords(self, check: float, row: float) -> int:
        """Guessed tokens that may be checked now, all of which may be wrong, at these prices for all and for each."""
        return max(0, int((self.steps - check) / row))

    def earn(self, steps: float) -> None:
        """Add what was gained; negative for what was lost."""
        self.steps = min(MOST, self.steps + steps)


class Proposal(NamedTuple):
    """A guess of what follows the pending token.

    Attributes:
        masks: of what may be chosen behind that and behind each; None for anything.
        forced: whether a grammar leaves no other text.
    """

    tokens: list[int]
    masks: list[Mask | None] | None = None
    forced: bool = False


_NOTHING = Proposal([])


class Speculator:
    """Guesses for whichever sequence decodes alone.

    Args:
        limit: most tokens of a guess from the context.
        force: most tokens of one that a grammar forces.

    Attributes:
        limit: as given. Where it is 0, there is nothing to guess for an answer without a grammar.
        proposed: tokens that were guessed and checked.
        accepted: those of them that were right.

    Raises:
        OperatorError: if guesses from the context are wanted of a model whose caches can't forget a wrong one.
    """

    def __init__(self, limit: int, force: int, loaded: LoadedModel) -> None:
        if limit and not loaded.cache_map.can_be_cut:
            raise OperatorError(
                "--speculate-tokens needs a model whose caches keep every token, and this one has layers with a window "
                "or a recurrent state, which can't take back a wrong guess; start without it"
            )
        self.proposed = self.accepted = 0
        self.limit = limit
        self._force = force if loaded.cache_map.can_be_cut else 0
        self._loaded = loaded
        weights = [array for _, array in cast(list[tuple[str, mx.array]], tree_flatten(loaded.model.parameters()))]
        self._weight_bytes = sum(array.nbytes for array in weights)
        device = "cpu" if mx.default_device() == mx.cpu else "gpu"
        self._check = CHECK[device]
        quantised = device == "cpu" and any(array.dtype == mx.uint32 for array in weights)
        self._row = ROW["cpu quantised" if quantised else device]
        self._ident = -1
        self._lookup = Lookup((), 0)
        self._purse = Purse()
        self._reach = FIRST_GUESS

    def propose(self, stream: Stream) -> Proposal:
        """The tokens that will follow the pending one, perhaps. None to go on without a guess.

        Waits for the pending token if there is something to guess behind it, or a grammar, and only then.
        """
        answer, pending = stream.job.answer, stream.pending
        assert answer is not None
        assert pending is not None
        assert stream.chooser is not None
        constraint = stream.constraint
        if not stream.chooser.memoryless or not (self.limit or self._force):
            return _NOTHING
        total = min(answer.max_tokens, stream.loaded.info.context_limit - stream.prompt_length)
        if stream.ident != self._ident:
            self._ident, self._purse, self._reach = stream.ident, Purse(), FIRST_GUESS
            self._lookup = Lookup(stream.job.tokens, total)
        self._purse.earn(ALLOWANCE)
        left = total - len(stream.completion) - (not stream.sent)
        affords = min(left - 1, self._purse.affords(self._check, self._price(stream.done)))
        if constraint is None:
            return Proposal(self._look_up(stream, pending, min(affords, self.limit, self._reach)))
        if affords < 1:
            return _NOTHING
        try:
            stream.constrain()
            forced = constraint.forced(min(affords, self._force))
            guess = forced or self._look_up(stream, pending, min(affords, self.limit, self._reach))
            return Proposal(*constraint.masks(guess), forced=bool(forced)) if guess else _NOTHING
        except RanOut:  # the next step says so
            return _NOTHING

    def _look_up(self, stream: Stream, pending: Choice, count: int) -> list[int]:
        """A guess from the context, of so many tokens at most."""
        if count < 1:
            return []
        known = stream.completion[len(self._lookup) - stream.prompt_length :]
        if not stream.sent and pending.known:
            known.append(pending.read())
        self._lookup.extend(known)
        if stream.sent or pending.known:
            return self._lookup.guess(count)
        guess = self._lookup.guess(count + 1)
        if guess and pending.read() != guess[0]:
            self._purse.earn(-WAITING)
            return []
        return guess[1:]

    def learn(self, stream: Stream, proposal: Proposal, accepted: int) -> None:
        """What came of a guess, which the answer has now as far as it was right."""
        proposed = len(proposal.tokens)
        if stream.constraint is not None:
            stream.constraint.go_back(len(stream.completion))
        if proposal.forced:
            stream.forced += accepted
        else:
            self.proposed += proposed
            self.accepted += accepted
            self._reach = 2 * accepted + 1
        self._purse.earn(accepted - self._check - proposed * self._price(stream.done))

    def _price(self, length: int) -> float:
        """Steps that a guessed token costs behind so many others. A step reads weights and context once."""
        context = self._loaded.cache_map.live_bytes(length)
        return self._row + ATTENTION * context / (context + self._weight_bytes)
