"""The model's chat template: what it writes for messages, and whether it writes all of them.

Nothing here knows any model. What a template does with messages of given roles is found out by having it write others,
whose contents are marks that are looked for.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from warmkv_server.contract.content import NO_SETUP, ChatMessage, Setup
from warmkv_server.errors import InvalidField
from warmkv_server.text.render import Renderer, message_as_told, tool_as_told

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper  # imports MLX

MOST_RENDERED = 32 << 20
"""Characters that a chat template may make of a request's messages: twice what a message of the default size holds."""
_FIELD = "content.chat.messages"
_SHAPES, _MOST_ROLES = 256, 4096
"""Shapes of conversations that are remembered, and characters of roles and calls in one of them."""
_SETUPS = 16
"""Of conversations, whose shapes are remembered."""
_SYSTEM = "system"


class Refused(Exception):
    """The template raised an error."""


def mark(number: int) -> str:
    """A content that no template changes, and that is in no other."""
    return f"warmkv-message-{number}-here"


def anchor_of(message: ChatMessage) -> str:
    """A text in a message that stands for others, behind which nothing of it comes but marks."""
    return mark_in(message.calls[-1].arguments) if message.calls else message.content


def mark_in(arguments: str) -> str:
    """The mark that arguments of a call have in them, if they have one."""
    found = _MARK.search(arguments)
    return found[0] if found is not None else arguments


_MARK = re.compile(r"warmkv-message-\d+-here")


@dataclass(frozen=True)
class Shape:
    """What the template does with messages of some roles, whatever they say.

    Attributes:
        before: the messages that stand for an earlier conversation; the last one's content is a mark.
        parts: indices of the messages whose content it wants as a list of parts, those before included.
        lost: indices of the messages, without those before, of which it writes nothing.
        gap: what it writes between the last of those before, or the beginning, and the first of the others.
        forgets: whether it leaves out those before, once others follow.
        error: what it raises.
    """

    before: tuple[ChatMessage, ...] = ()
    parts: frozenset[int] = frozenset()
    lost: tuple[int, ...] = ()
    gap: str = ""
    forgets: bool = False
    error: str = ""

    @property
    def good(self) -> bool:
        return not self.error and not self.lost and not self.forgets

    @property
    def anchor(self) -> str:
        """The text behind which it writes the messages."""
        return anchor_of(self.before[-1])


Roles = tuple[ChatMessage, ...]
"""Each message without what it says, but for whether it says anything."""
_SAYS = "-"


class Template:
    """The chat template of a tokenizer that has one, with the tools and variables of a conversation.

    Args:
        arguments_as_text: whether it wants a call's arguments as text, and not as an object.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper | None,
        setup: Setup = NO_SETUP,
        renderer: Renderer | None = None,
        *,
        arguments_as_text: bool = False,
    ) -> None:
        if renderer is None:
            assert tokenizer is not None
            renderer = Renderer(tokenizer)
        self.renderer = renderer
        self.setup = setup
        self.arguments_as_text = arguments_as_text
        self._tools = [tool_as_told(tool) for tool in setup.tools]
        self._remembered = lru_cache(_SHAPES)(self._probe)
        self._others = lru_cache(_SETUPS)(self._with)

    def under(self, setup: Setup, *, arguments_as_text: bool = False) -> Template:
        """The same, for a conversation that is set up so."""
        if not self.renderer.reads_clock:
            setup = replace(setup, clock=0.0)
        return self._others(setup, arguments_as_text)

    def _with(self, setup: Setup, arguments_as_text: bool) -> Template:
        return Template(None, setup, self.renderer, arguments_as_text=arguments_as_text)

    def shape(self, before: Sequence[str | ChatMessage], messages: Sequence[ChatMessage], answer: bool) -> Shape:
        """
        Args:
            before: the messages that stand for an earlier conversation, or their roles.
            answer: whether a generation prompt follows.
        """
        earlier = tuple(ChatMessage(each, _SAYS) if isinstance(each, str) else each for each in before)
        roles = tuple(replace(message, content=_SAYS if message.content.strip() else "") for message in messages)
        small = sum(message.characters for message in (*earlier, *roles)) <= _MOST_ROLES
        return (self._remembered if small else self._probe)(earlier, roles, answer)

    def whole(self, messages: Sequence[ChatMessage], answer: bool, *, skip: int = 0) -> str:
        """What it writes for a conversation.

        Args:
            skip: how many of the messages were sent before, and are not of this request.

        Raises:
            InvalidField: if it refuses messages, or writes nothing of one of them.
        """
        shape = self.shape((), messages, answer)
        self.require(shape, messages, skip=skip)
        written = self.write(shape, messages, answer)
        self.require_contents(shape, messages, answer, written, skip=skip)
        return written

    def write(self, shape: Shape, messages: Sequence[ChatMessage], answer: bool) -> str:
        """What it writes for messages behind those of the shape.

        Raises:
            InvalidField: if it refuses them.
        """
        try:
            return self._render((*shape.before, *messages), shape.parts, answer)
        except Refused as error:
            raise InvalidField.of(_FIELD, f"the chat template refuses them: {error}") from error

    def closing(self, shape: Shape) -> str:
        """What it writes behind the last of the messages before, where nothing follows."""
        try:
            written = self._render(shape.before, shape.parts, answer=False)
        except Refused:
            return ""
        return written.rpartition(shape.anchor)[2]

    def require(self, shape: Shape, messages: Sequence[ChatMessage], *, skip: int = 0, merges: bool = False) -> None:
        """
        Args:
            skip: how many of the messages were sent before, and are not of this request.
            merges: whether it would write all of them if a user's message followed.

        Raises:
            InvalidField: naming the first message that it refuses, or writes nothing of.
        """
        if shape.error:
            before, index = [message.role for message in shape.before], len(messages) - 1
            least = 0
            while least < index:  # a beginning that is refused has the message that is
                middle = (least + index) // 2
                if self.shape(before, messages[: middle + 1], answer=False).error:
                    index = middle
                else:
                    least = middle + 1
            why = f"the chat template refuses it: {shape.error}"
        elif shape.lost:
            index = shape.lost[0]
            role = messages[index].role
            why = f"the model's chat template writes nothing of a message of role {role!r} in this place"
        else:
            return
        if index < skip:
            why = f"behind it {messages[index].role!r} message {index} of this context, which waits, is lost"
        raise InvalidField.of(f"{_FIELD}[{max(0, index - skip)}]", f"{why}; {_remedy(messages[index], merges)}")

    def require_contents(
        self, shape: Shape, messages: Sequence[ChatMessage], answer: bool, written: str, *, skip: int = 0
    ) -> None:
        """
        Args:
            written: for these messages, which are all written where they say something else.
            skip: how many of the messages are not of this request.

        Raises:
            InvalidField: naming the first message that is left out for what it says.
        """
        changed = [n for n, message in enumerate(messages) if message.content.strip() not in written]
        if not changed:
            return
        # It escapes them, or leaves out a part, such as earlier reasoning: what stands around it and a word of it tell.
        marks = {n: mark(len(shape.before) + n) for n in changed}
        around = list(messages)
        for n, sign in marks.items():
            around[n] = replace(messages[n], content=f"{sign} {messages[n].content} {sign}")
        marked = self.write(shape, around, answer)
        for n, sign in marks.items():
            if sign not in marked or not _has_of(messages[n].content, written):
                raise InvalidField.of(
                    f"{_FIELD}[{max(0, n - skip)}]",
                    "the model's chat template writes nothing of a message that says this; reword it",
                )

    def _probe(self, before: Roles, roles: Roles, answer: bool) -> Shape:
        messages = [
            replace(message, content=mark(n) if message.content else "") for n, message in enumerate((*before, *roles))
        ]
        contents = [message.content for message in messages]
        stand_in = tuple(messages[: len(before)])
        parts, lost, written, error = self._forms(messages, answer)
        if error:
            return Shape(stand_in, error=error)
        blank = frozenset(n for n, message in enumerate(messages) if not message.content and not message.calls)
        if blank - parts:
            # Nothing shows in which form it wants those; so they are tried with something to say.
            said = [replace(message, content=mark(n)) for n, message in enumerate(messages)]
            wanted = self._forms(said, answer)[0] & blank
            with contextlib.suppress(Refused):
                written, parts = self._render(messages, parts | wanted, answer), parts | wanted
        anchor = anchor_of(stand_in[-1]) if before else ""
        start = written.find(anchor) + len(anchor)
        own = range(len(before), len(messages))
        behind = written[start:]
        lost |= {n for n in own if not _is_there(messages[n], behind)}
        first = min((behind.find(contents[n]) for n in own if contents[n] and contents[n] in behind), default=-1)
        gap = behind if first < 0 else behind[:first]
        forgets = any(n < len(before) for n in lost)
        return Shape(stand_in, parts, tuple(sorted(n - len(before) for n in lost if n >= len(before))), gap, forgets)

    def _forms(self, messages: Sequence[ChatMessage], answer: bool) -> tuple[frozenset[int], set[int], str, str]:
        """Which messages it wants as parts, which of them it leaves out then, what it writes, and its error."""
        parts: frozenset[int] = frozenset()
        best: tuple[frozenset[int], set[int], str, str] | None = None
        for _ in range(3):
            try:
                written = self._render(messages, parts, answer)
            except Refused as error:
                best = best or (parts, set(), "", str(error))
                if parts:
                    break
                parts = frozenset(range(len(messages)))
                continue
            raw = {n for n in parts if _is_data(messages[n].content, written)}
            lost = {n for n, message in enumerate(messages) if not _is_there(message, written)} | raw
            if best is None or best[3] or len(lost) < len(best[1]):
                best = (parts, lost, written, "")
            if not lost:
                break
            parts = parts - raw if raw else parts | lost
        assert best is not None
        return best

    def _render(self, messages: Iterable[ChatMessage], parts: frozenset[int], answer: bool) -> str:
        try:
            told = [
                message_as_told(m, as_parts=n in parts, arguments_as_text=self.arguments_as_text)
                for n, m in enumerate(messages)
            ]
            written = self.renderer.apply(told, answer, self.setup, self._tools)
        except MemoryError:
            raise
        except Exception as error:  # templates raise jinja2 errors, and whatever their own code raises
            raise Refused(" ".join(str(error).split()) or type(error).__name__) from error
        if len(written) > MOST_RENDERED:
            raise InvalidField.of(
                _FIELD,
                f"the model's chat template makes {len(written)} characters of them, and {MOST_RENDERED} are the most",
            )
        return written


def _is_there(message: ChatMessage, written: str) -> bool:
    """Whether what a message says was written, and the names of the tools that it calls."""
    if message.calls and not all(call.name in written for call in message.calls):
        return False
    if message.calls and _MARK.search(message.calls[-1].arguments):
        return anchor_of(message) in written
    return message.content in written


def _is_data(content: str, written: str) -> bool:
    """Whether a list of parts was written as a list, which no template means to do."""
    return f"'text': '{content}'" in written or f'"text": "{content}"' in written


def _has_of(content: str, written: str) -> bool:
    """Whether the longest word or the last one of a content, if it has any, was written."""
    words = re.findall(r"\w+", content)
    return not words or max(words, key=len) in written or words[-1] in written


def _remedy(message: ChatMessage, merges: bool) -> str:
    if merges:
        return "send it together with the user's message that follows it"
    if message.role == _SYSTEM:
        return "put all that it says into one system message at the beginning, or into a user's message"
    if message.role == "user":
        return "send the messages in an order that the template takes, or send content.text"
    return "put what it says into a user's message, or send content.text"
