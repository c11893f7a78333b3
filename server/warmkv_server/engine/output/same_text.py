"""Which tokens say the same: a text that was told and comes back is often tokenised in another way than it was sampled.

Tokens say the same where their bytes are the same. What was added to the vocabulary, such as the mark of a turn, says
itself and nothing else, however it is spelled; and where a text was cut within a character, it says what its decoder
makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from warmkv_server.engine.output.answer_text import Spelling
from warmkv_server.engine.output.constraint import Vocabulary

Tokens = NDArray[np.int32]

_MARK = b"\xff"
"""Before the number of a token that says itself. No UTF-8 has this byte."""
_NUMBER = 4
_FIRST_WIDTH = 64
_LAST_WIDTH = 1 << 16
"""Tokens of either side that are spelled at a time: few, since most that differ say something else."""
_STEPS = 4096
"""Places where the two differ, at most: what follows is left as it is."""
_BEFORE = 8
"""Tokens that others are decoded behind."""
_CUT = 4096
"""Tokens up to the next mark, of a text that may have been cut within a character."""
_LOOK = 12
_BROKEN = "\ufffd"


@dataclass(frozen=True)
class Alike:
    """Of two sequences, the beginnings that say the same.

    Attributes:
        held, wanted: how many tokens they have.
        changed: tokens of the held one's that the wanted one's hasn't.
    """

    held: int
    wanted: int
    changed: int


def common_length(a: Tokens, b: Tokens) -> int:
    """How many tokens they begin with alike."""
    size = min(len(a), len(b))
    unlike = np.flatnonzero(a[:size] != b[:size])
    return int(unlike[0]) if unlike.size else size


def may_say_the_same(spelling: Spelling, held: Tokens, wanted: Tokens, common: int) -> bool:
    """Whether it is worth a look: what follows the tokens that they have in common begins alike. At once.

    Args:
        common: how many these are.
    """
    first = max(0, common - _BEFORE)
    one, other = (spelling.text(each[first : common + _LOOK].tolist()) for each in (held, wanted))
    if _BROKEN in one or _BROKEN in other:
        return True
    return one.startswith(other) or other.startswith(one)


class SameText:
    """Used on any thread; what is spelled once is remembered."""

    def __init__(self, vocabulary: Vocabulary, spelling: Spelling) -> None:
        self._bytes = _Bytes(vocabulary)
        self._spelling = spelling

    def best(self, held: Sequence[Tokens], wanted: Tokens) -> tuple[int, Alike]:
        """The first of those that say most of it, by its number."""
        found = [self.alike(each, wanted) for each in held]
        number = max(range(len(found)), key=lambda n: found[n].wanted)
        return number, found[number]

    def alike(self, held: Tokens, wanted: Tokens) -> Alike:
        """How much of both says the same, from the first token on. Takes time in proportion to their lengths."""
        a = b = changed = 0
        width = _FIRST_WIDTH
        for _ in range(_STEPS):
            run = common_length(held[a:], wanted[b:])
            a, b = a + run, b + run
            if a == len(held) or b == len(wanted):
                break
            step, more = self._step(held[a : a + width], wanted[b : b + width])
            if not step.held:
                if more and width < min(_LAST_WIDTH, max(len(held) - a, len(wanted) - b)):
                    width *= 2
                    continue
                step = self._cut(held, wanted, a, b)
                if not step.held:
                    break
            a, b, changed = a + step.held, b + step.wanted, changed + step.changed
            width = min(2 * width, _LAST_WIDTH) if more else _FIRST_WIDTH
        return Alike(a, b, changed)

    def _step(self, held: Tokens, wanted: Tokens) -> tuple[Alike, bool]:
        """The longest beginnings of the same bytes, and whether one of the two is such a beginning as a whole."""
        ones, others = self._bytes.of(held), self._bytes.of(wanted)
        one, other = b"".join(ones), b"".join(others)
        size = min(len(one), len(other))
        unlike = np.flatnonzero(np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size))
        same = int(unlike[0]) if unlike.size else size
        ends, other_ends = _ends(ones), _ends(others)
        both = np.intersect1d(ends[ends <= same], other_ends[other_ends <= same], assume_unique=True)
        if not both.size:
            return Alike(0, 0, 0), same == size
        a, b = (int(np.searchsorted(each, both[-1])) + 1 for each in (ends, other_ends))
        kept = np.intersect1d(_places(held[:a], ends[:a]), _places(wanted[:b], other_ends[:b]), assume_unique=True)
        return Alike(a, b, a - len(kept)), same == size

    def _cut(self, held: Tokens, wanted: Tokens, a: int, b: int) -> Alike:
        """All up to the next mark, if it was cut within a character and says the same but for its bytes."""
        one, other = self._bytes.before_mark(held[a : a + _CUT]), self._bytes.before_mark(wanted[b : b + _CUT])
        ends = len(one) < len(held[a : a + _CUT]) or a + len(one) == len(held)
        if not a or not ends or not len(one) or not 0 < len(other) < len(wanted[b : b + _CUT]):
            return Alike(0, 0, 0)
        before = held[max(0, a - _BEFORE) : a].tolist()
        text = self._spelling.text([*before, *one.tolist()])
        if _BROKEN not in text or text != self._spelling.text([*before, *other.tolist()]):
            return Alike(0, 0, 0)
        return Alike(len(one), len(other), len(one))


class _Bytes(dict[int, bytes]):
    """The bytes of a token, for what it says; of one that says itself, a mark and its number."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def of(self, tokens: Tokens) -> list[bytes]:
        return [self[token] for token in tokens.tolist()]

    def before_mark(self, tokens: Tokens) -> Tokens:
        """Those before the first that says itself; all, if none does."""
        end = next((n for n, token in enumerate(tokens.tolist()) if self[token].startswith(_MARK)), len(tokens))
        return tokens[:end]

    def __missing__(self, token: int) -> bytes:
        said = self._vocabulary.said(token)
        self[token] = said if said and _MARK not in said else _MARK + token.to_bytes(_NUMBER, "little")
        return self[token]


def _ends(pieces: Sequence[bytes]) -> NDArray[np.int64]:
    return np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))


def _places(tokens: Tokens, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for each token and where it ends."""
    return (ends << 32) | tokens.astype(np.int64)
