"""From content to tokens: raw text, raw tokens, and chat messages, exact to the token.

Thread-safe and synchronous. How long it takes, and how much memory, is up to the content and to the model's own chat
template: the server calls it in processes that it can stop (text_pool.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from warmkv_server.contract.content import Chat, Content, Ending, Message, RawText, TokenIds
from warmkv_server.errors import ContextTooLong, InvalidField, Unsupported

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper  # imports MLX
from warmkv_server.text.token_bytes import most_bytes_per_token

MOST_RENDERED = 32 << 20
"""Characters that a chat template may make of a request's messages: twice what a message of the default size holds."""
_SENTINEL = "the earlier answer"


def ending_after(content: Content | None, *, answered: bool, previous: str) -> str:
    """The ending to keep with a context once `content` (None: nothing) and perhaps an answer were put behind it."""
    if isinstance(content, Chat):
        return Ending.ANSWER if answered else Ending.TURN
    if content is None and Ending(previous or Ending.RAW) is Ending.ANSWER:
        return Ending.ANSWER
    if content is None and not answered:
        return Ending(previous or Ending.RAW)
    return Ending.RAW


class Text:
    """The tokenizer and chat template of the loaded model.

    Attributes:
        bytes_per_token: of UTF-8 that one token stands for at most; 0 where that can't be told.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.bytes_per_token = most_bytes_per_token(tokenizer)
        self._vocab_size = vocab_size
        self._bos = _bos_ids(tokenizer)
        # The server checks the context limit itself; the tokenizer would only warn about it, on stderr.
        tokenizer.model_max_length = 1 << 60

    def encode(
        self,
        content: Content,
        *,
        starts: bool,
        ending: str,
        last_token: int | None,
        answer: bool,
        room: int | None = None,
    ) -> list[int]:
        """The tokens to put behind the held context.

        Args:
            starts: whether the content starts the context: only then it gets a BOS and a default system text.
            ending: what the held context ends with (`ending_after` of the turn before).
            last_token: the held context's last token.
            answer: whether to add the template's generation prompt behind a chat.
            room: tokens that there is room for. A text that is certain to have more is refused before it is tokenised.

        Raises:
            InvalidField: a token id outside the vocabulary, no chat template, or messages the template refuses.
            Unsupported: the chat template can't render messages behind others.
            ContextTooLong: there is no room for it.
        """
        match content:
            case RawText(text):
                ids = self._ids(text, "content.text", room)
                return self._bos + ids if starts and ids[: len(self._bos)] != self._bos else ids
            case TokenIds(ids):
                return self._known(list(ids), "content.token_ids.ids")
            case Chat(messages):
                self._require_template()
                if starts:
                    rendered = self._render(messages, answer)
                else:
                    rendered = self._follow_up(messages, Ending(ending), last_token, answer)
                return self._ids(rendered, "content.chat.messages", room)

    def _ids(self, text: str, field: str, room: int | None) -> list[int]:
        if room is not None and self.bytes_per_token and _utf8_length(text) > room * self.bytes_per_token:
            raise ContextTooLong(f"{field} has more tokens than the {room} that there is room for; send less")
        return self._known(list(self.tokenizer.encode(text, add_special_tokens=False)), field)

    def _known(self, ids: list[int], field: str) -> list[int]:
        """The ids, all of which the model has to know: a tokenizer can have more than it."""
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            index, token = next((n, token) for n, token in enumerate(ids) if not 0 <= token < self._vocab_size)
            rule = f"{token} is not a token of this model; ids run from 0 to {self._vocab_size - 1}"
            if field == "content.token_ids.ids":
                raise InvalidField.of(f"{field}[{index}]", rule)
            raise InvalidField.of(field, f"the tokenizer makes token {index} of it, and {rule}")
        return ids

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
        except MemoryError:
            raise
        except Exception as error:  # templates raise jinja2 errors, and whatever their own code raises
            raise InvalidField.of("content.chat.messages", f"the chat template refuses them: {error}") from error
        written = str(rendered)
        if len(written) > MOST_RENDERED:
            raise InvalidField.of(
                "content.chat.messages",
                f"the model's chat template makes {len(written)} characters of them, and {MOST_RENDERED} are the most",
            )
        return written

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
        whole = self._render([*stand_in, *messages], answer)
        if _SENTINEL not in before or _SENTINEL not in whole:
            raise Unsupported(
                "this model's chat template doesn't write out the text of earlier messages, so that none can be put "
                "behind a context; send the whole conversation (Prime, or CONTEXT_MODE_REPLACE), or content.text"
            )
        closing = before[before.rindex(_SENTINEL) + len(_SENTINEL) :]
        rest = whole[whole.index(_SENTINEL) + len(_SENTINEL) :]
        follow_up = rest.removeprefix(closing)
        if ending is not Ending.ANSWER:
            return follow_up
        if last_token is not None and last_token in self.tokenizer.eos_token_ids:
            closing = closing.removeprefix(str(self.tokenizer.decode([last_token])))
        return closing + follow_up


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _bos_ids(tokenizer: TokenizerWrapper) -> list[int]:
    """What the tokenizer itself puts before a text."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a", add_special_tokens=True))
    return full[: full.index(bare[0])] if bare and bare[0] in full else []
