"""Which tokens may follow, so that an answer's text becomes a sentence of its grammar.

llguidance has for every state of a grammar a mask: a bit for each token of the vocabulary. It works on the tokens'
bytes, so that any cut of a sentence into tokens is one that may be sampled, and no other text is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from copy import copy
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from warmkv_server.contract.grammar import Grammar
from warmkv_server.engine.output.answer_text import Spelling
from warmkv_server.errors import Unsupported
from warmkv_server.text import grammars
from warmkv_server.text.message_grammar import source
from warmkv_server.text.trial import follow_first

Mask = npt.NDArray[np.uint8]
"""A bit for each token, lowest first; (bytes,)."""

_CHECKED = 512
"""Tokens whose bytes are compared with what the tokenizer makes of them."""


class RanOut(Exception):
    """A grammar took too much for one token, or has come to where nothing can follow."""


class Vocabulary:
    """The model's tokens as llguidance knows them. Takes a second or so to make, on any thread.

    Args:
        width: ids below it may be chosen; None of the others is in a mask.
        ends: tokens that end an answer. They are no text, whatever the tokenizer says of them.

    Raises:
        Unsupported: if nothing ends an answer, or the tokens' bytes aren't known.
    """

    def __init__(self, tokenizer: TokenizerWrapper, spelling: Spelling, width: int, ends: Collection[int]) -> None:
        if not ends:
            raise Unsupported("response_format: no token ends an answer of this model", field="response_format")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or spelling.cleans:
            raise _unknown_bytes()
        self.ends = sorted(ends)
        self.width = width
        most = max(width, max(tokenizer.get_vocab().values()) + 1)
        backend = copy(backend)
        backend.no_padding()
        backend.no_truncation()
        try:
            self.tokens = LLTokenizer(backend.to_str(), n_vocab=most, eos_token=self.ends)
        except ValueError as error:
            raise _unknown_bytes() from error
        self._check(tokenizer, spelling)
        self._added = frozenset((*tokenizer.added_tokens_decoder, *self.ends))
        marks = {str(added.content): token for token, added in tokenizer.added_tokens_decoder.items()}
        self._marks = {mark: n for mark, n in marks.items() if self.tokens.is_special_token(n) and n not in self.ends}
        longest = sorted(map(re.escape, filter(None, self._marks)), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(longest)})" if longest else "(?!)")

    def spell(self, text: str) -> list[str | int]:
        """The text in pieces, of which those that are tokens of their own, and no text, are these tokens."""
        pieces: list[str] = self._cut.split(text)
        return [self._marks.get(piece, piece) for piece in pieces if piece]

    def said(self, token: int) -> bytes:
        """The bytes that a token stands for; none for one that is no text, or that was added to the vocabulary."""
        known = 0 <= token < self.tokens.vocab_size and token not in self._added
        return self.tokens.decode_bytes([token]) if known and not self.tokens.is_special_token(token) else b""

    def _check(self, tokenizer: TokenizerWrapper, spelling: Spelling) -> None:
        """Compare with what answers are decoded with: a tokenizer's files can say more than llguidance reads."""
        ids = sorted(tokenizer.get_vocab().values())
        anchor = tokenizer.encode("a", add_special_tokens=False)
        before = spelling.text(anchor)
        for token in ids[:: max(1, len(ids) // _CHECKED)]:
            if token in spelling.bytes or self.tokens.is_special_token(token) or token in self.ends:
                continue
            written = spelling.text([*anchor, token]).removeprefix(before)
            if "\ufffd" not in written and written.encode() != self.tokens.decode_bytes([token]):
                raise _unknown_bytes()


class Constraint:
    """A grammar behind the tokens of one answer. Used on the MLX thread, once it is made.

    Attributes:
        taken: tokens of the answer that it stands behind.
    """

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher) -> None:
        self._ends = vocabulary.ends
        self._bytes = -(-vocabulary.width // 8)
        self._last = (1 << (vocabulary.width % 8 or 8)) - 1
        self._matcher = matcher
        self.taken = 0
        self._over = 0

    @classmethod
    def compile(cls, grammar: Grammar, vocabulary: Vocabulary) -> Constraint:
        """Lets go of Python's lock for what takes long.

        Raises:
            InvalidField, Unsupported, ConstraintTooComplex: if it can't be followed with these tokens.
        """
        text = source(grammar, vocabulary.spell)
        matcher = LLMatcher(vocabulary.tokens, text, log_level=0, limits=grammars.LIMITS)
        follow_first(grammar, matcher)
        return cls(vocabulary, matcher)

    def copy(self) -> Constraint:
        """Another one, that stands where this does."""
        made = copy(self)
        made._matcher = self._matcher.deep_copy()
        return made

    def take(self, tokens: Sequence[int]) -> None:
        """Go on behind these.

        Raises:
            RanOut
        """
        for token in tokens:
            self.taken += 1
            if self._over or token in self._ends:
                self._over += 1
            elif not self._matcher.consume_token(token):
                raise RanOut(self._matcher.get_error())

    def go_back(self, count: int) -> None:
        """Stand behind the first `count` tokens, of those that it has taken."""
        back = self.taken - count
        over = min(back, self._over)
        self.taken, self._over = count, self._over - over
        if back > over:
            self._matcher.rollback(back - over)

    def mask(self) -> Mask | None:
        """What may follow; None where the answer is over.

        Raises:
            RanOut
        """
        if self._over:
            return None
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: self._bytes].copy()
        if self._matcher.is_error():
            raise RanOut(self._matcher.get_error())
        found[-1] &= self._last
        accepts = self._matcher.is_accepting()
        for end in self._ends:
            found[end >> 3] = found[end >> 3] & ~np.uint8(1 << (end & 7)) | np.uint8(accepts << (end & 7))
        if not found.any():
            raise RanOut("nothing can follow")
        return found

    def forced(self, most: int) -> list[int]:
        """Tokens that spell what has to follow, as the tokenizer would; none where there is a choice."""
        if self._over or self._matcher.is_error():
            return []
        if self._matcher.is_stopped():
            return self._ends if len(self._ends) == 1 and most else []
        found: list[int] = self._matcher.compute_ff_tokens()[:most]
        return found

    def masks(self, guess: Sequence[int]) -> tuple[list[int], list[Mask | None]]:
        """As much of a guess as the grammar has, and the masks before, between and behind those tokens, which it takes.

        Raises:
            RanOut
        """
        found: list[int] = []
        masks = [self.mask()]
        for token in guess:
            mask = masks[-1]
            if mask is None or token >= len(mask) * 8 or not mask[token >> 3] >> (token & 7) & 1:
                break
            self.take([token])
            found.append(token)
            masks.append(self.mask())
        return found, masks


def bias_of(masks: Sequence[Mask | None], width: int, dtype: mx.Dtype) -> mx.array:
    """To add to logits, (rows, width): 0 where a token may be chosen, else minus infinity. Lazy.

    The eight of a byte are looked up together; of the ways tried it is the fastest by far.
    """
    most = -(-width // 8)
    rows = np.full((len(masks), most), 255, np.uint8)
    for row, mask in zip(rows, masks, strict=True):
        if mask is not None:
            row[:] = 0
            row[: len(mask)] = mask[:most]
    looked_up: mx.array = _table(dtype)[mx.array(rows)]
    return looked_up.reshape(len(masks), -1)[:, :width]


@cache
def _table(dtype: mx.Dtype) -> mx.array:
    """Of every byte, (256, 8)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = mx.array(np.where(bits, 0.0, -np.inf).astype(np.float32)).astype(dtype)
    mx.eval(table)
    return table


def _unknown_bytes() -> Unsupported:
    return Unsupported(
        "response_format: the bytes of this model's tokens are not known, so nothing can be enforced",
        field="response_format",
    )
