"""What a chat template writes for messages behind an earlier conversation.

Templates write whole conversations. So the messages are written behind others that stand for the earlier ones, and what
belongs to those is cut off: behind a generated answer at the first mark of an end of sequence, since the model has
written it; behind a turn that the template closed itself at the end of what closes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from warmkv_server.contract.content import ChatMessage, ToolCall
from warmkv_server.contract.conversation import Ending, MadeCall, role_before
from warmkv_server.errors import Unsupported
from warmkv_server.text.template import Shape, Template, mark

_TOOL = "tool"
_CALLS = 1000
"""Number of the mark in the arguments of the first call that stands for an earlier one: no message has it."""
_ANSWERED = (("user", "assistant"), ("system", "user", "assistant"))
"""Conversations that end with an answer; the second where a template wants a system message."""


@dataclass(frozen=True)
class FollowUp:
    """Text for the tokenizer: `before + text` with the tokens of `before + closed` cut off is what comes next.

    Attributes:
        before: the end of the earlier conversation, or what stands for it: it decides how the first token is cut.
        closed: what the template wrote behind it when nothing followed, and the context has. `text` begins with it, or
            with what the template has there when more follows.
        text: what it writes when the messages follow.
        replaces_last: whether the last token of the context gives way to it.
    """

    before: str
    closed: str
    text: str
    replaces_last: bool = False


def follow_up(
    template: Template,
    messages: Sequence[ChatMessage],
    ending: str,
    last_token: int | None,
    ends: Mapping[int, str],
    answer: bool,
    calls: Sequence[MadeCall] = (),
) -> FollowUp:
    """
    Args:
        ending: of the context.
        last_token: of the context.
        ends: how the template writes the tokens that end an answer.
        answer: whether a generation prompt follows.
        calls: that the last answer of the context made.

    Raises:
        InvalidField: if the template refuses messages, or writes nothing of one of them.
        Unsupported: if it can't write messages behind others.
    """
    shape = _behind(template, messages, ending, answer, calls)
    whole = template.write(shape, messages, answer)
    rest = whole[whole.index(shape.anchor) + len(shape.anchor) :]
    template.require_contents(shape, messages, answer, rest)
    if Ending.of(ending) is not Ending.ANSWER:
        closing = template.closing(shape)
        if Ending.of(ending) is not Ending.RAW:
            return FollowUp(shape.anchor, closing, rest)
        if not rest.startswith(closing):
            # It closes a turn in another way where more follows: what it writes at a beginning too closes none.
            opening = _alike_at_the_end(shape.gap, template.shape((), messages, answer).gap)
            closing = rest[: len(shape.gap) - opening]
        return FollowUp(shape.anchor + closing, "", rest.removeprefix(closing))
    gap = rest[: len(shape.gap)]
    first = min(((gap.find(text), -len(text)) for text in ends.values() if text and text in gap), default=None)
    # The rest of the calls that stand for the model's own is no more than those.
    behind = 0 if not shape.before[-1].calls else first[0] if first else _alike(gap, template.closing(shape))
    if last_token is None or last_token not in ends:
        return FollowUp(shape.anchor + rest[:behind], "", rest[behind:])
    own = ends[last_token]
    if not own or first != (gap.find(own), -len(own)):
        # It closes an answer in another way than the model does, or not at all: what it has there takes the place.
        return FollowUp(shape.anchor + rest[:behind], "", rest[behind:], replaces_last=True)
    cut = first[0] + len(own)
    return FollowUp(shape.anchor + rest[:cut], "", rest[cut:])


def _behind(
    template: Template, messages: Sequence[ChatMessage], ending: str, answer: bool, calls: Sequence[MadeCall]
) -> Shape:
    """The shape of these messages behind the earlier conversation that is most like this one and is written out."""
    role = role_before(ending)
    before: list[tuple[str | ChatMessage, ...]] = list(_ANSWERED)
    if Ending.of(ending) is not Ending.ANSWER and not role and messages[0].role == "assistant":
        before.insert(0, ("user",))
    elif role in ("user", "system"):
        before.insert(0, (role,))
    elif role not in ("", "assistant"):
        before.insert(0, ("user", "assistant", role))
    if calls and (Ending.of(ending) is Ending.ANSWER or role == _TOOL):
        answered = _calling(calls)
        before[:0] = [("user", *answered), ("system", "user", *answered)]
    shapes = []
    for roles in before:
        shapes.append(shape := template.shape(roles, messages, answer))
        if shape.good:
            return shape
    for shape in shapes:
        if not shape.forgets and template.shape((), shape.before, answer=False).good:
            template.require(shape, messages)
    raise Unsupported(
        "this model's chat template doesn't write out the text of earlier messages, so that none can be put "
        "behind a context; send the whole conversation (Prime, or CONTEXT_MODE_REPLACE), or content.text",
        field="content.chat",
    )


def _calling(calls: Sequence[MadeCall]) -> list[str | ChatMessage]:
    """Messages that stand for an answer that made these calls, and for the results that are there."""
    made, results = [], []
    for number, call in enumerate(calls):
        ident = call.written or call.id
        made.append(ToolCall(ident, call.name, f'{{"value": "{mark(_CALLS + number)}"}}'))
        if call.answered:
            results.append(ChatMessage(_TOOL, "-", call_id=ident, name=call.name))
    return [ChatMessage("assistant", "", calls=tuple(made)), *results]


def _alike(first: str, second: str) -> int:
    """How many characters they begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(first), len(second)))


def _alike_at_the_end(first: str, second: str) -> int:
    """How many characters they end with alike."""
    pairs = enumerate(zip(reversed(first), reversed(second), strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(first), len(second)))
