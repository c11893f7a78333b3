"""From content to tokens: raw text, raw tokens, and chat messages, exact to the token.

Thread-safe and synchronous. How long it takes, and how much memory, is up to the content and to the model's own chat
template: the server calls it in processes that it can stop (pool.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from warmkv_server.contract.content import NO_SETUP, Chat, ChatMessage, Content, Encoded, RawText, Setup, TokenContent
from warmkv_server.contract.conversation import MadeCall, held_back
from warmkv_server.errors import ContextTooLong, InvalidField, Unsupported
from warmkv_server.text.follow_up import follow_up
from warmkv_server.text.probe import Findings, probe
from warmkv_server.text.schemas import require_schemas, require_strict, strict_grammar
from warmkv_server.text.template import Template, mark
from warmkv_server.text.token_bytes import most_bytes_per_token
from warmkv_server.text.traits import Traits, traits_of
from warmkv_server.text.trial import Trial

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper  # imports MLX

_MOST_HELD_BACK = 1 << 19
"""Characters of messages that wait for the next one: they are kept with the agent, and written with every commit."""
_MESSAGES = "content.chat.messages"
_TAIL = 32
"""Of a prompt's last tokens, those that a mark of reasoning is looked for in."""
_OPEN = mark(1 << 20)
"""Behind the text of a message that goes on; all behind it is cut off."""


class Text:
    """The tokenizer and chat template of the loaded model.

    Attributes:
        bytes_per_token: of UTF-8 that one token stands for at most; 0 where that can't be told.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.bytes_per_token = most_bytes_per_token(tokenizer)
        self.template = Template(tokenizer) if tokenizer.has_chat_template else None
        self._vocab_size = vocab_size
        self._bos = _bos_ids(tokenizer)
        self._ends = {token: _written(tokenizer, token) for token in sorted(tokenizer.eos_token_ids)}
        # The server checks the context limit itself; the tokenizer would only warn about it, on stderr.
        tokenizer.model_max_length = 1 << 60

    def encode(
        self,
        content: Content,
        *,
        starts: bool,
        ending: str,
        held: int,
        tail: Sequence[int],
        answer: bool,
        room: int | None = None,
        setup: Setup = NO_SETUP,
        calls: Sequence[MadeCall] = (),
        traits: Traits | None = None,
    ) -> Encoded:
        """The tokens to put behind the held context.

        Args:
            starts: whether the content starts the context: only then it gets a BOS and a default system text.
            ending: what the held context ends with (`ending_after` of the turn before).
            held: tokens of the held context.
            tail: the last of them, `TAIL` at most.
            answer: whether to add the template's generation prompt behind a chat.
            room: tokens that there is room for. A text that is certain to have more is refused before it is tokenised.
            setup: what a chat is written with.
            calls: that the last answer of the context made.
            traits: of the chat template, if they are known.

        Raises:
            InvalidField: a token id outside the vocabulary, no chat template, or messages that the template refuses or
                doesn't write.
            Unsupported: the chat template can't render messages behind others, or knows no tools or not this variable.
            ContextTooLong: there is no room for it.
        """
        match content:
            case RawText(text):
                ids = self._ids(text, "content.text", room)
                return _encoded(self._bos + ids if starts and ids[: len(self._bos)] != self._bos else ids)
            case TokenContent(ids):
                return _encoded(self._known(list(ids), "content.token_ids.ids"))
            case Chat():
                known = traits or self.traits
                _require(content, setup, known)
                template = self._require_template().under(setup, arguments_as_text=known.arguments_as_text)
                template.renderer.dated = False
                messages = content.messages
                if content.continue_last:
                    messages = (*messages[:-1], replace(messages[-1], content=messages[-1].content + _OPEN))
                    answer = False
                if earlier := held_back(ending):
                    new = self._beginning(template, (*earlier, *messages), len(earlier), held, answer, room)
                elif starts:
                    new = self._beginning(template, messages, 0, 0, answer, room)
                else:
                    new = self._behind(template, messages, ending, tail, answer, room, calls)
                begun = self._begun(new.tokens[-_TAIL:].tolist(), known) if answer and known.reasoning else 0
                return replace(new, dated=template.renderer.dated, thinks=begun)

    def _begun(self, tail: list[int], traits: Traits) -> int:
        """How many of a prompt's last tokens begin reasoning."""
        if not traits.thinks(self.tokenizer.decode(tail)):
            return 0
        assert traits.reasoning is not None
        counts = range(1, len(tail) + 1)
        return next((n for n in counts if traits.reasoning[0] in self.tokenizer.decode(tail[-n:])), len(tail))

    @cached_property
    def traits(self) -> Traits:
        """What the chat template makes of tools and reasoning."""
        return traits_of(self._require_template(), self._ends)

    def probe(self) -> Findings:
        """What the server makes of the tokenizer and the chat template."""
        return probe(self.tokenizer, self.template, self._ends, self.traits if self.template is not None else None)

    def _beginning(
        self,
        template: Template,
        messages: Sequence[ChatMessage],
        earlier: int,
        held: int,
        answer: bool,
        room: int | None,
    ) -> Encoded:
        """A conversation from its start.

        Args:
            earlier: how many of the messages were sent before, and held back.
        """
        shape = template.shape((), messages, answer)
        if shape.good:
            written = _cut(template.whole(messages, answer, skip=earlier))
            return _encoded(self._ids(written, _MESSAGES, room), held)
        merges = template.shape((), (*messages, ChatMessage("user", "-")), answer).good
        if not merges or answer:
            template.require(shape, messages, skip=earlier, merges=merges)
        if sum(message.characters + 8 for message in messages) > _MOST_HELD_BACK:
            raise InvalidField.of(
                _MESSAGES,
                "the model's chat template writes them with the user's message that follows, and they are too long to "
                "wait for it; send them together with it",
            )
        return _encoded(self._until_the_user(template, messages), held, holds_back=True)

    def _until_the_user(self, template: Template, messages: Sequence[ChatMessage]) -> list[int]:
        """The tokens of messages that are held back: what they begin with in any case."""
        number = len(messages)
        whole = self._rendered(template, [*messages, ChatMessage("user", mark(number))])
        shape = template.shape((), messages, answer=False)
        if not shape.error:
            alone = self._encode(template.write(shape, messages, answer=False))
            if alone and whole[: len(alone)] == alone:
                return alone
        others = [replace(message, content=mark(n)) for n, message in enumerate(messages)]
        for different in ([*others, ChatMessage("user", mark(number))], [*messages, ChatMessage("user", "another")]):
            if common := _common(whole, self._rendered(template, different)):
                return whole[:common]
        raise InvalidField.of(
            f"{_MESSAGES}[0]",
            "the model's chat template writes it with the user's message that follows; send them together",
        )

    def _rendered(self, template: Template, messages: Sequence[ChatMessage]) -> list[int]:
        return self._encode(template.write(template.shape((), messages, answer=False), messages, answer=False))

    def _behind(
        self,
        template: Template,
        messages: Sequence[ChatMessage],
        ending: str,
        tail: Sequence[int],
        answer: bool,
        room: int | None,
        calls: Sequence[MadeCall],
    ) -> Encoded:
        """Messages behind others that are in the context already."""
        found = follow_up(template, messages, ending, tail[-1] if tail else None, self._ends, answer, calls)
        found = replace(found, text=_cut(found.text))
        head = self._encode(found.before + found.closed)
        whole = self._ids(found.before + found.text, _MESSAGES, room)
        common = _common(head, whole)
        more = head[common:]
        if not more:
            return _encoded(whole[common:], int(found.replaces_last))
        if found.closed and len(more) <= len(tail) and list(tail[-len(more) :]) == more:
            # Where more follows, the template closes the turn before in another way.
            return _encoded(whole[common:], len(more))
        # Tokens that lie across the seam: what follows is cut by itself.
        text = found.text.removeprefix(found.closed)
        return _encoded(self._ids_in_the_middle(text, room), int(found.replaces_last))

    def _ids_in_the_middle(self, text: str, room: int | None) -> list[int]:
        """The tokens of a text that doesn't stand at the beginning, where some tokenizers put a space before it."""
        for mark_text in self._ends.values():
            head = self._encode(mark_text)
            whole = self._ids(mark_text + text, _MESSAGES, room)
            if len(head) == 1 and whole[:1] == head:
                return whole[1:]
        return self._ids(text, _MESSAGES, room)

    def _ids(self, text: str, field: str, room: int | None) -> list[int]:
        if room is not None and self.bytes_per_token and _utf8_length(text) > room * self.bytes_per_token:
            raise ContextTooLong(
                f"{field} has more tokens than the {room} that there is room for; send less",
                field=field,
                limit=room,
                unit="tokens",
            )
        return self._known(self._encode(text), field)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _known(self, ids: list[int], field: str) -> list[int]:
        """The ids, all of which the model has to know: a tokenizer can have more than it."""
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            index, token = next((n, token) for n, token in enumerate(ids) if not 0 <= token < self._vocab_size)
            rule = f"{token} is not a token of this model; ids run from 0 to {self._vocab_size - 1}"
            if field == "content.token_ids.ids":
                raise InvalidField.of(f"{field}[{index}]", rule)
            raise InvalidField.of(field, f"the tokenizer makes token {index} of it, and {rule}")
        return ids

    def _require_template(self) -> Template:
        if self.template is None:
            raise InvalidField.of(
                "content.chat", "this model has no chat template; send content.text or content.token_ids instead"
            )
        return self.template


def _require(chat: Chat, setup: Setup, traits: Traits) -> None:
    """Refuse what the model's chat template can't write, by name."""
    called = next((n for n, message in enumerate(chat.messages) if message.calls), None)
    if setup.tools or called is not None:
        field = "content.chat.tools" if setup.tools else f"{_MESSAGES}[{called}].tool_calls"
        if setup.tools and chat.tools is None:  # from when there was another chat template
            remedy = "they are the context's; replace it without them (Prime, or CONTEXT_MODE_REPLACE)"
        else:
            remedy = "leave them out, or describe them in a message"
        if traits.tools != "written":
            raise Unsupported(
                f"{field}: this model's chat template doesn't write tools ({traits.tools}), so that it can't call any; "
                f"{remedy}",
                field=field,
            )
        if traits.form is None:
            raise Unsupported(
                f"{field}: the calls that this model's chat template writes can't be read back, so that it is served "
                f"without tools; {remedy}",
                field=field,
            )
    if chat.tools:
        require_schemas(chat.tools)
        require_strict(dict(enumerate(chat.tools)), traits)
        for number, tool in enumerate(chat.tools):
            if tool.strict:
                Trial(strict_grammar(tool, number)).run()
    unknown = sorted(set(json.loads(setup.variables or "{}")) - set(traits.variables))
    if unknown:
        known = ", ".join(traits.variables) or "none"
        remedy = "leave them out" if chat.variables is not None else "they are the context's; send others, or {}"
        raise Unsupported(
            f"content.chat.template_variables: the model's chat template doesn't use {', '.join(unknown)[:200]}; it "
            f"uses {known}; {remedy}",
            field="content.chat.template_variables",
        )


def _cut(text: str) -> str:
    """Without what stands behind a message that goes on."""
    return text.partition(_OPEN)[0]


def _encoded(ids: Sequence[int], replaced: int = 0, holds_back: bool = False) -> Encoded:
    return Encoded(np.asarray(ids, np.int32), replaced, holds_back)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens they begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _written(tokenizer: TokenizerWrapper, token: int) -> str:
    """A token as a text has it."""
    added = tokenizer.added_tokens_decoder.get(token)
    return str(added.content) if added is not None else str(tokenizer.decode([token]))


def _bos_ids(tokenizer: TokenizerWrapper) -> list[int]:
    """What the tokenizer itself puts before a text."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a", add_special_tokens=True))
    return full[: full.index(bare[0])] if bare and bare[0] in full else []
