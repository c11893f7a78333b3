"""From content to tokens: raw text, raw tokens, and chat messages, exact to the token.

Thread-safe and synchronous. Long content takes milliseconds: call it from a worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from warmkv_server.errors import InvalidField

_SENTINEL = "the earlier answer"


@dataclass(frozen=True)
class RawText:
    text: str


@dataclass(frozen=True)
class TokenIds:
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    messages: tuple[Message, ...]


Content = RawText | TokenIds | Chat


class Ending(StrEnum):
    """What a context ends with, which decides how chat messages go on behind it."""

    RAW = "raw"
    """Raw text or tokens, or nothing: messages follow as they are."""
    TURN = "turn"
    """A message that the template has closed."""
    ANSWER = "answer"
    """A generated answer: the template's text after an answer comes first."""


class Text:
    """The tokenizer and chat template of the loaded model."""

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._bos = _bos_ids(tokenizer)
        # The server checks the context limit itself; the tokenizer would only warn about it, on stderr.
        tokenizer.model_max_length = 1 << 60

    def encode(self, content: Content, *, starts: bool, ending: str, last_token: int | None, answer: bool) -> list[int]:
        """The tokens to put behind the held context.

        Args:
            starts: whether the content starts the context: only then it gets a BOS and a default system text.
            ending: what the held context ends with (`ending_after` of the turn before).
            last_token: the held context's last token.
            answer: whether to add the template's generation prompt behind a chat.

        Raises:
            InvalidField: a token id outside the vocabulary, no chat template, or messages the template refuses.
        """
        match content:
            case RawText(text):
                ids = self._ids(text)
                return self._bos + ids if starts and ids[: len(self._bos)] != self._bos else ids
            case TokenIds(ids):
                return self._checked(ids)
            case Chat(messages):
                self._require_template()
                if starts:
                    return self._ids(self._render(messages, answer))
                return self._ids(self._follow_up(messages, Ending(ending), last_token, answer))

    def ending_after(self, content: Content | None, *, answered: bool, previous: str) -> str:
        """The ending to keep with a context once `content` (None: nothing) and perhaps an answer were put behind it."""
        if isinstance(content, Chat):
            return Ending.ANSWER if answered else Ending.TURN
        if content is None and Ending(previous or Ending.RAW) is Ending.ANSWER:
            return Ending.ANSWER
        if content is None and not answered:
            return Ending(previous or Ending.RAW)
        return Ending.RAW

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _checked(self, ids: Sequence[int]) -> list[int]:
        for index, token in enumerate(ids):
            if not 0 <= token < self._vocab_size:
                raise InvalidField.of(
                    f"content.token_ids.ids[{index}]",
                    f"{token} is not a token of this model; ids run from 0 to {self._vocab_size - 1}",
                )
        return list(ids)

    def _require_template(self) -> None:
        if not self.tokenizer.has_chat_template:
            raise InvalidField.of(
                "content.chat", "this model has no chat template; send content.text or content.token_ids instead"
            )

    def _render(self, messages: Sequence[Message], answer: bool) -> str:
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages],
                tokenize=False,
                add_generation_prompt=answer,
            )
        except Exception as error:  # templates raise jinja2 errors, and whatever their own code raises
            raise InvalidField.of("content.chat.messages", f"the chat template refuses them: {error}") from error
        return str(rendered)

    def _follow_up(self, messages: Sequence[Message], ending: Ending, last_token: int | None, answer: bool) -> str:
        """What the template writes for these messages behind an earlier conversation.

        Rendered behind a stand-in conversation, whose text is then cut off: templates can't render a part.
        """
        stand_in = [Message("user", "-")]
        if messages[0].role != "assistant":
            stand_in.append(Message("assistant", _SENTINEL))
        else:
            stand_in[0] = Message("user", _SENTINEL)
        before = self._render(stand_in, answer=False)
        closing = before[before.rindex(_SENTINEL) + len(_SENTINEL) :]
        whole = self._render([*stand_in, *messages], answer)
        rest = whole[whole.index(_SENTINEL) + len(_SENTINEL) :]
        follow_up = rest.removeprefix(closing)
        if ending is not Ending.ANSWER:
            return follow_up
        if last_token is not None and last_token in self.tokenizer.eos_token_ids:
            closing = closing.removeprefix(str(self.tokenizer.decode([last_token])))
        return closing + follow_up


def _bos_ids(tokenizer: TokenizerWrapper) -> list[int]:
    """What the tokenizer itself puts before a text."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a", add_special_tokens=True))
    return full[: full.index(bare[0])] if bare and bare[0] in full else []
