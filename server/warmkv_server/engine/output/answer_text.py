"""The text of an answer as it grows: no broken characters, no stop strings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import TokenizersBackend

_ANSWER = "answer"
_BROKEN = "\ufffd"
_BEFORE = 8
"""Tokens of the prompt that the answer's first ones are decoded behind."""
_LONG = 32
"""Tokens that are decoded together, before their beginning is left out."""
_BYTES_HELD = 64
"""Bytes of which each is a token that are held back, since one that is wrong breaks all of them; then they are told as
they are."""


class Spelling:
    """A tokenizer's `decode`, and what has to be known of it to decode an answer token by token.

    The reference is what `decode` makes of prompt and answer, without what it makes of the prompt. mlx-lm's streaming
    detokenizers differ from it: they take what an added token says for bytes written as letters, the byte 0 for a
    letter, a SentencePiece decoder on a vocabulary of bytes for one of SentencePiece, and a lone space for nothing.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._decode: Callable[[Sequence[int]], Any] = tokenizer.decode
        self._known: Collection[int] | None = None
        self._one = lru_cache(1 << 14)(lambda token: self.text([token]))
        self.bytes = _byte_tokens(tokenizer)
        probe = tokenizer.encode("a ,b", add_special_tokens=False)
        self.cleans = " ," not in self.text(probe)
        """Whether spaces go away once it is known what follows them."""
        kind = type(tokenizer._tokenizer)
        if not self.cleans and kind.decode is TokenizersBackend.decode and kind._decode is TokenizersBackend._decode:
            # What transformers' decode comes to then, in a fifth of the time.
            self._decode = partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)

    def text(self, tokens: Sequence[int]) -> str:
        """What `decode` makes of them; ids that the tokenizer doesn't have say nothing."""
        try:
            return str(self._decode(tokens))
        except Exception:  # slow tokenizers can't join what they don't know
            if self._known is None:
                self._known = frozenset(self._tokenizer.get_vocab().values())
            return str(self._decode([token for token in tokens if token in self._known]))

    def of_one(self, token: int) -> str:
        """As `text`, remembered."""
        return self._one(token)


class AnswerText:
    """Turns tokens into text that is certain: whole characters, and no start of what may become a stop string.

    What is new is found by decoding the last few tokens together: behind others, as they stand in the context.

    Args:
        prompt: its last tokens decide how the first token of the answer is spelled (a space before a word, the rest of
            a character); their own text is not part of the answer.
        silent: tokens without text (end of sequence).
        stop: strings that end the answer.
    """

    def __init__(self, spelling: Spelling, prompt: Sequence[int], silent: Collection[int], stop: Sequence[str]) -> None:
        self._spelling = spelling
        self._silent = silent
        self._stop = stop
        first = max(0, len(prompt) - _BEFORE)
        while first > 0 and len(prompt) - first < _BYTES_HELD and prompt[first] in spelling.bytes:
            first -= 1
        self._before = list(prompt[first:])
        self._window = list(self._before)
        self._base = spelling.text(self._before)
        self._sent = len(self._base)
        self._fresh = 0
        self._answer: list[int] = []
        machine = TextStateMachine(
            {_ANSWER: [(text, f"stop {n}") for n, text in enumerate(stop)]}
            | {f"stop {n}": [] for n in range(len(stop))}
        )
        self._state = machine.make_state(_ANSWER)
        self._settled = 0
        self.matched_stop = ""

    def push(self, token: int) -> str:
        """The text that became certain with this token. Look at `matched_stop` afterwards."""
        self._answer.append(token)
        if token in self._silent:
            return ""
        self._window.append(token)
        self._fresh += 1
        held = token in self._spelling.bytes
        if held and (self._fresh < _BYTES_HELD or self._fresh % _BYTES_HELD > 3):
            return ""
        written = self._spelling.text(self._window)
        if held and _BROKEN in written[self._sent :]:
            return ""
        certain = self._certain(written)
        text = self._new(written, certain)
        if certain == len(written):
            self._move(1)
        elif self._fresh >= _LONG:
            self._move(_BEFORE, held=len(written) - certain)
        return self._emit(text)

    def finish(self) -> str:
        """The text held back until now, when the answer ends otherwise than by a stop string."""
        written = self._spelling.text(self._window)
        text = self._emit(self._new(written, len(written)))
        if self.matched_stop:
            return text
        self._state, held, _ = TextStateMachine.flush(self._state)
        return text + str(held)

    def tokens_behind_stop(self) -> int:
        """How many of the last tokens lie wholly behind the matched stop string (held-back bytes delay the match)."""
        whole = self._spelled(len(self._answer))
        before = _alike(self._spelling.text(self._before), whole)
        keep = len(self._answer)
        # A character that the first tokens leave unfinished is not alike: it belongs to the token that completes it.
        while keep > 1 and _alike(self._spelled(keep - 1), whole) - before >= self._settled:
            keep -= 1
        return len(self._answer) - keep

    def _certain(self, written: str) -> int:
        """Characters of it that stay whatever follows."""
        end = len(written)
        while len(written) - end < 3 and written.endswith(_BROKEN, 0, end):
            end -= 1  # the rest of a character may follow
        if self._spelling.cleans:
            space = written.rfind(" ", max(0, end - 4), end)
            end = space if space >= 0 else end
        return end

    def _new(self, written: str, end: int) -> str:
        """What is told now."""
        if self._base:
            # The prompt can end within a character that the answer completes.
            self._sent = min(self._sent, _alike(self._base, written))
        text = written[self._sent : end]
        if text:
            self._sent, self._base = end, ""
        return text

    def _move(self, count: int, held: int = 0) -> None:
        """Go on behind the last tokens.

        Args:
            count: of tokens, unless they say nothing by themselves.
            held: characters at their end that are held back.
        """
        while True:
            last = self._window[-count:]
            written = self._spelling.of_one(last[0]) if len(last) == 1 else self._spelling.text(last)
            whole = written and (_BROKEN not in written or held)
            if whole or len(last) == len(self._window) or count > _LONG:
                break
            count += 1
        self._window, self._sent, self._base, self._fresh = last, len(written) - held, "", 0

    def _emit(self, segment: str) -> str:
        if not self._stop:
            return segment
        self._state, parts = TextStateMachine.split(self._state, segment)
        text = "".join(part for state, part in parts if state == _ANSWER)
        self._settled += len(text)
        if self._state[0] != _ANSWER and not self.matched_stop:
            self.matched_stop = self._stop[int(self._state[0].removeprefix("stop "))]
            self._settled += len(self.matched_stop)
        return text

    def _spelled(self, count: int) -> str:
        """What the first tokens of the answer say behind the prompt, with the prompt's last words."""
        tokens = [token for token in self._answer[:count] if token not in self._silent]
        return self._spelling.text([*self._before, *tokens])


def _alike(first: str, second: str) -> int:
    """How many characters they begin with alike."""
    return next(
        (n for n, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )


def _byte_tokens(tokenizer: TokenizerWrapper) -> frozenset[int]:
    """Tokens that stand for one byte each and are spelled with their neighbours (SentencePiece's byte fallback)."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = tokenizer.convert_tokens_to_ids(names)
    known = {name: token for name, token in zip(names, ids, strict=True) if token is not None}
    known = {name: token for name, token in known.items() if tokenizer.convert_ids_to_tokens(token) == name}
    return frozenset(known.values() if any(tokenizer.decode([token]) != name for name, token in known.items()) else ())
