"""The text of an answer as it grows: no broken characters, no stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper

_ANSWER = "answer"


class AnswerText:
    """Turns tokens into text that is certain: whole characters, and no start of what may become a stop string.

    Args:
        before: the prompt's last token, which decides how the first token of the answer is spelled (a space before a
            word, the rest of a character); its own text is not part of the answer.
        silent: tokens without text (end of sequence).
        stop: strings that end the answer.
    """

    def __init__(self, tokenizer: TokenizerWrapper, before: int, silent: Collection[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._before = before
        self._silent = silent
        self._stop = stop
        self._tokens: list[int] = []
        self._detokenizer = self._fresh()
        machine = TextStateMachine(
            {_ANSWER: [(text, f"stop {n}") for n, text in enumerate(stop)]}
            | {f"stop {n}": [] for n in range(len(stop))}
        )
        self._state = machine.make_state(_ANSWER)
        self._settled = 0
        self.matched_stop = ""

    def push(self, token: int) -> str:
        """The text that became certain with this token. Look at `matched_stop` afterwards."""
        self._tokens.append(token)
        if token in self._silent:
            return ""
        self._detokenizer.add_token(token)
        return self._emit(self._detokenizer.last_segment)

    def finish(self) -> str:
        """The text held back until now, when the answer ends otherwise than by a stop string."""
        self._detokenizer.finalize()
        text = self._emit(self._detokenizer.last_segment)
        if self.matched_stop:
            return text
        self._state, held, _ = TextStateMachine.flush(self._state)
        return text + str(held)

    def tokens_behind_stop(self) -> int:
        """How many of the last tokens lie wholly behind the matched stop string (held-back bytes delay the match)."""
        keep = len(self._tokens)
        while keep > 1 and self._spelled(keep - 1) >= self._settled:
            keep -= 1
        return len(self._tokens) - keep

    def _emit(self, segment: str) -> str:
        self._state, parts = TextStateMachine.split(self._state, segment)
        text = "".join(part for state, part in parts if state == _ANSWER)
        self._settled += len(text)
        if self._state[0] != _ANSWER and not self.matched_stop:
            self.matched_stop = self._stop[int(self._state[0].removeprefix("stop "))]
            self._settled += len(self.matched_stop)
        return text

    def _spelled(self, count: int) -> int:
        """Whole characters that the first tokens spell: one that they leave unfinished belongs to the next token."""
        detokenizer = self._fresh()
        for token in self._tokens[:count]:
            if token not in self._silent:
                detokenizer.add_token(token)
        detokenizer.finalize()
        return len(detokenizer.last_segment.rstrip("\ufffd"))

    def _fresh(self) -> StreamingDetokenizer:
        detokenizer: StreamingDetokenizer = self._tokenizer.detokenizer
        detokenizer.add_token(self._before)
        _ = detokenizer.last_segment
        return detokenizer
