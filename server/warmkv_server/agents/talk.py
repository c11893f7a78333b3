"""What a chat is written with, and what of it goes on: tools, variables, the clock, and the calls that wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from warmkv_server.contract.calls import CallFinished
from warmkv_server.contract.content import Chat, ChatMessage, Content, Encoded, Setup
from warmkv_server.contract.conversation import ChatState, Ending, MadeCall
from warmkv_server.errors import InvalidField, NoPendingCall, ToolsChanged
from warmkv_server.kv.store import TokenIds

TOOL = "tool"
_CALLS_KEPT, _NAME_KEPT = 256, 128
"""Calls of an answer that may wait, and characters of their names and ids that are kept."""


@dataclass(frozen=True)
class Written:
    """A chat as it is written behind a context, or from its start.

    Attributes:
        messages: with the names and ids of the calls whose results they are.
        setup: what they are written with.
        before: the calls of the context's last answer.
        after: what goes on, but for the clock.
    """

    messages: tuple[ChatMessage, ...]
    setup: Setup
    before: tuple[MadeCall, ...]
    after: ChatState


def written(chat: Chat, conversation: ChatState, *, behind: bool) -> Written:
    """
    Args:
        conversation: the agent's.
        behind: whether it goes behind the context, and not in its place.

    Raises:
        ToolsChanged, NoPendingCall, InvalidField
    """
    if behind and chat.tools is not None and chat.tools != conversation.tools:
        raise ToolsChanged(
            "content.chat.tools are other ones than the context has; leave them out to go on with those, or replace "
            "the context (Prime, or CONTEXT_MODE_REPLACE)",
            field="content.chat.tools",
        )
    tools = conversation.tools if behind and chat.tools is None else chat.tools or ()
    variables = conversation.variables if chat.variables is None else chat.variables
    calls = conversation.calls if behind else ()
    messages, waiting = _settled(chat.messages, calls)
    clock = time.time() if conversation.clock is None else conversation.clock
    reasoning = conversation.reasoning if behind else ()
    after = ChatState(tools, variables, conversation.clock, waiting, reasoning)
    return Written(messages, Setup(tools, variables, clock), calls, after)


def afresh(conversation: ChatState) -> ChatState:
    """What stays where the context is replaced."""
    return ChatState(variables=conversation.variables, clock=conversation.clock)


def without_reasoning(content: Content | None, held: TokenIds, conversation: ChatState) -> Encoded | None:
    """What takes the place of a context's end where a user's message drops reasoning; None where nothing is dropped."""
    if not isinstance(content, Chat) or not conversation.reasoning:
        return None
    if not any(message.role == "user" for message in content.messages):
        return None
    first = conversation.reasoning[0][0]
    cuts = [*conversation.reasoning, (len(held), len(held))]
    parts = [held[end:start] for (_, end), (start, _) in pairwise(cuts)]
    return Encoded(np.concatenate(parts), len(held) - first)


def after_answer(
    conversation: ChatState, calls: Sequence[CallFinished], reasoning: tuple[int, int] | None
) -> ChatState:
    """The conversation behind an answer.

    Args:
        reasoning: the tokens that the next user's message drops.
    """
    made = tuple(
        MadeCall(call.call.id[:_NAME_KEPT], call.call.name[:_NAME_KEPT], call.written[:_NAME_KEPT])
        for call in calls[:_CALLS_KEPT]
    )
    dropped = (*conversation.reasoning, reasoning) if reasoning is not None else conversation.reasoning
    return replace(conversation, calls=made, reasoning=dropped)


def role_after(content: Chat) -> str:
    """The ending behind messages that were written."""
    return str(Ending.ANSWER) if content.continue_last else f"{Ending.TURN} {content.messages[-1].role}"


def _settled(
    messages: Sequence[ChatMessage], calls: tuple[MadeCall, ...]
) -> tuple[tuple[ChatMessage, ...], tuple[MadeCall, ...]]:
    """The messages, each result with the call that it is of, and the calls of the last answer behind them."""
    found = []
    for number, message in enumerate(messages):
        if message.calls:
            calls = tuple(MadeCall(call.id, call.name) for call in message.calls)
        elif message.role == TOOL:
            call = _call_of(message, calls, f"content.chat.messages[{number}]")
            if call is not None:
                calls = tuple(replace(each, answered=each.answered or each is call) for each in calls)
                message = replace(message, call_id=call.written or call.id, name=call.name or message.name)
        elif message.role in ("user", "assistant"):
            calls = ()
        found.append(message)
    return tuple(found), calls


def _call_of(message: ChatMessage, calls: Sequence[MadeCall], field: str) -> MadeCall | None:
    """The call whose result a message is; None where nobody said so, and no call waits."""
    waiting = [call for call in calls if not call.answered]
    named = next((call for call in waiting if call.id == message.call_id), None)
    if named is not None:
        return named
    ids = ", ".join(call.id for call in waiting)[:200]
    if message.call_id and waiting:
        raise InvalidField.of(
            f"{field}.tool_call_id", f"{message.call_id!r} is no call that waits for its result; these wait: {ids}"
        )
    if message.call_id:
        raise NoPendingCall(
            f"{field}.tool_call_id: no call waits for its result; those of an answer wait until their results come, or "
            "a message of role user or assistant",
            field=f"{field}.tool_call_id",
        )
    if len(waiting) > 1:
        raise InvalidField.of(f"{field}.tool_call_id", f"must say which call's result this is; these wait: {ids}")
    return waiting[0] if waiting else None
