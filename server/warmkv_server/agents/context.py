"""What a request's content makes of its agent's context: all of its tokens, at the agent's turn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from warmkv_server.agents import talk
from warmkv_server.contract.content import NO_SETUP, Chat, Content, Encoded, RawText, Setup, TokenContent
from warmkv_server.contract.conversation import (
    NOTHING_YET,
    ChatState,
    Ending,
    MadeCall,
    held_back,
    holding,
    kept,
    plain,
)
from warmkv_server.contract.names import AgentKey
from warmkv_server.engine.engine import Engine
from warmkv_server.errors import ContextTooLong, EmptyContent, InvalidField, RevisionMismatch, Unsupported, Violation
from warmkv_server.kv.store import AgentRecord, Store, TokenIds
from warmkv_server.text.task import TAIL, Task

_MOST_KEPT = 900_000
"""Characters of what is kept with an agent besides its tokens; calls of its next answer come on top."""


@dataclass(frozen=True)
class Context:
    """A whole context.

    Attributes:
        agent: as of the last commit; None if there is none.
        tokens: shape (tokens,), with the new content.
        ending: what the context would end with if it were committed as it is.
        conversation: what goes on with it.
        thinks: how many of its last tokens begin reasoning that the answer goes on with.
        spliced: how many of its tokens took the place of others that say the same.
    """

    agent: AgentRecord | None
    tokens: TokenIds
    ending: str
    conversation: ChatState = NOTHING_YET
    thinks: int = 0
    spliced: int = 0

    @property
    def kept(self) -> str:
        """What is kept with the agent of how it goes on."""
        return kept(self.ending, self.conversation)

    @property
    def incarnation(self) -> int | None:
        return self.agent.incarnation if self.agent is not None else None


def check_revision(agent: AgentRecord | None, expected: int | None) -> None:
    """Raise RevisionMismatch unless the agent has the expected revision; 0 expects that there is no agent."""
    actual = agent.revision if agent is not None else 0
    if expected is not None and expected != actual:
        raise RevisionMismatch(
            f"the agent is at revision {actual} and not {expected}; read it with GetAgent and decide again"
            if actual
            else f"there is no such agent, and so no revision {expected}",
            revision=actual,
            expected_revision=expected,
        )


async def assemble(
    engine: Engine,
    store: Store,
    key: AgentKey,
    content: Content | None,
    *,
    append: bool,
    answer: bool,
    generation_prompt: bool = False,
) -> Context:
    """Put content behind the held context, or in its place.

    Args:
        append: whether it goes behind the held context.
        answer: whether an answer is going to follow, so that a chat gets its generation prompt, and no content means
            to go on from where the context is.
        generation_prompt: whether a chat gets it all the same.

    Raises:
        EmptyContent: if there is nothing to work on.
        ContextTooLong: before anything was computed.
        InvalidField: if the content can't be encoded.
        Unsupported: if the held tokens are another model's.
        ToolsChanged, NoPendingCall: if a chat doesn't go on from the agent's.
    """
    agent, held, ending = _held(engine, store, key, append)
    if is_empty(content):
        content = None
    prompted = answer or (generation_prompt and content is not None)
    conversation = ChatState.of(agent.ending) if agent is not None else NOTHING_YET
    new, conversation = await encode(engine, key.tenant, content, held, ending, conversation, answer=prompted)
    if not new.tokens.size and not (answer and held.size):
        raise empty_content()
    tokens = np.concatenate([held[: len(held) - new.replaced], new.tokens])
    if len(tokens) > engine.info.context_limit:
        raise ContextTooLong(
            f"the context would have {len(tokens)} tokens, and this server takes {engine.info.context_limit}; "
            "send less, or start a new context with CONTEXT_MODE_REPLACE",
            limit=engine.info.context_limit,
            actual=len(tokens),
            unit="tokens",
        )
    after = ending_after(content, answered=prompted, previous=ending, holds_back=new.holds_back)
    context = Context(agent, tokens, after, conversation, new.thinks)
    if len(context.kept) > _MOST_KEPT:
        field = "content.chat.messages" if new.holds_back else "content.chat.tools"
        raise InvalidField.of(
            field,
            f"are more than can be kept with an agent: {_MOST_KEPT} characters",
            limit=_MOST_KEPT,
            actual=len(context.kept),
            unit="characters",
        )
    return context


async def count(engine: Engine, store: Store, key: AgentKey, content: Content | None, *, append: bool) -> Encoded:
    """The tokens that Generate would put behind the held context, or in its place.

    Raises:
        EmptyContent: if there are none.
        ContextTooLong: if no context could hold them.
        InvalidField: if the content can't be encoded.
    """
    agent, held, ending = _held(engine, store, key, append)
    conversation = ChatState.of(agent.ending) if agent is not None else NOTHING_YET
    content = None if is_empty(content) else content
    new, _ = await encode(engine, key.tenant, content, held, ending, conversation, answer=True)
    if not new.tokens.size:
        raise empty_content()
    return new


async def encode(
    engine: Engine,
    tenant: str,
    content: Content | None,
    held: TokenIds,
    ending: str,
    conversation: ChatState,
    *,
    answer: bool,
) -> tuple[Encoded, ChatState]:
    """The tokens of content that is put behind held ones, how many of those they replace, and what goes on then.

    Args:
        conversation: the agent's.

    Raises:
        InvalidField: if it can't be encoded, or messages of the context that wait for a user's would be lost behind it.
        ToolsChanged, NoPendingCall: if a chat doesn't go on from the agent's.
    """
    if not isinstance(content, Chat) and (content is not None or answer) and ending.startswith(Ending.HELD):
        raise InvalidField.of(
            "content",
            "the model's chat template writes the messages of this context with the user's message that follows; send "
            "that as content.chat, or replace the context",
        )
    if not isinstance(content, Chat):
        goes_on = conversation
        if content is not None:
            goes_on = replace(conversation if held.size else talk.afresh(conversation), calls=())
        return await _tokens(engine, tenant, content, held, ending, answer=answer), goes_on
    chat = talk.written(content, conversation, behind=bool(held.size))
    shorter = talk.without_reasoning(content, held, conversation) if held.size else None
    base, after = held, chat.after
    if shorter is not None:
        base = np.concatenate([held[: len(held) - shorter.replaced], shorter.tokens])
        after = replace(after, reasoning=())
    content = replace(content, messages=chat.messages)
    new = await _tokens(engine, tenant, content, base, ending, answer=answer, setup=chat.setup, calls=chat.before)
    if shorter is not None:
        rest = shorter.tokens[: len(shorter.tokens) - new.replaced]
        new = replace(new, tokens=np.concatenate([rest, new.tokens]), replaced=shorter.replaced)
    return new, replace(after, clock=chat.setup.clock) if new.dated else after


async def _tokens(
    engine: Engine,
    tenant: str,
    content: Content | None,
    held: TokenIds,
    ending: str,
    *,
    answer: bool,
    setup: Setup = NO_SETUP,
    calls: tuple[MadeCall, ...] = (),
) -> Encoded:
    if content is None:
        return Encoded(np.empty(0, np.int32))
    if isinstance(content, TokenContent):
        return Encoded(_known(np.asarray(content.ids, np.int64), engine.info.vocab_size))
    tail = tuple(held[-TAIL:].tolist())
    task = Task(
        content,
        starts=not held.size,
        ending=plain(ending),
        held=len(held),
        tail=tail,
        answer=answer,
        room=engine.info.context_limit,
        setup=setup,
        calls=calls,
    )
    new = await engine.text.encode(task, tenant)
    if not new.replaced:
        return new
    gone = held[len(held) - new.replaced :]
    length = min(len(gone), len(new.tokens))
    unlike = np.flatnonzero(gone[:length] != new.tokens[:length])
    alike = int(unlike[0]) if unlike.size else length
    return replace(new, tokens=new.tokens[alike:], replaced=new.replaced - alike)


def ending_after(content: Content | None, *, answered: bool, previous: str, holds_back: bool = False) -> str:
    """The ending to keep with a context once `content` (None: nothing) and perhaps an answer were put behind it.

    Args:
        holds_back: whether the template didn't write the messages yet.
    """
    if isinstance(content, Chat):
        if answered:
            return Ending.ANSWER
        if holds_back:
            return holding((*held_back(previous), *content.messages))
        return talk.role_after(content)
    if content is None and Ending.of(previous) is Ending.ANSWER:
        return Ending.ANSWER
    if content is None and not answered:
        return plain(previous) or Ending.RAW
    return Ending.RAW


def _known(ids: npt.NDArray[np.int64], vocab_size: int) -> TokenIds:
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if wrong.size:
        raise InvalidField.of(
            f"content.token_ids.ids[{wrong[0]}]",
            f"{ids[wrong[0]]} is not a token of this model; ids run from 0 to {vocab_size - 1}",
        )
    return ids.astype(np.int32)


def _held(engine: Engine, store: Store, key: AgentKey, append: bool) -> tuple[AgentRecord | None, TokenIds, str]:
    """The agent, and the tokens and the ending that new content is put behind."""
    agent = store.agent(key.tenant, key.agent_id) if key.agent_id else None
    if agent is None or not append:
        return agent, np.empty(0, np.int32), str(Ending.RAW)
    held = store.tokens(key.tenant, key.agent_id)
    _require_vocabulary(agent, held, engine.info.vocab_size)
    return agent, held, agent.ending


def is_empty(content: Content | None) -> bool:
    match content:
        case RawText(text):
            return not text
        case TokenContent(ids):
            return not ids
        case Chat(messages):
            return not messages
    return True


def empty_content() -> EmptyContent:
    return EmptyContent(
        "the content is empty and there is no context to go on from; give text, token_ids or chat",
        violations=[Violation("content", "must not be empty where there is no context yet")],
    )


def _require_vocabulary(agent: AgentRecord, held: TokenIds, vocab_size: int) -> None:
    if not agent.fingerprint_ok and held.size and int(held.max()) >= vocab_size:
        raise Unsupported(
            "the agent's context was made with another model and has tokens that this one doesn't know; "
            "replace the context, or serve the other model"
        )


def may_splice(content: Content | None, *, whole: bool, said: bool | None) -> bool:
    """Whether held tokens may take the place of those that say the same; see splice.py.

    Args:
        whole: whether the content is the whole context.
        said: by the request; None where it says nothing.
    """
    return whole and (said if said is not None else isinstance(content, Chat))
