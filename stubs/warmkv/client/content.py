"""What a request says, in short words."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from google.protobuf.message import Message

from warmkv import v1


def chat(*messages: tuple[str, str]) -> v1.Content:
    """Chat messages, each a role and what was said: `chat(("system", "Be brief."), ("user", "Hello!"))`."""
    said = [v1.ChatMessage(role=role, content=content) for role, content in messages]
    return v1.Content(chat=v1.ChatMessages(messages=said))


def text(value: str) -> v1.Content:
    """Plain text, without the model's chat template."""
    return v1.Content(text=value)


def tokens(ids: Iterable[int]) -> v1.Content:
    """Token ids, verbatim."""
    return v1.Content(token_ids=v1.TokenIds(ids=ids))


def from_user(said: str | v1.Content | None) -> v1.Content | None:
    """A string is one message of the user's; other content is what it is."""
    return chat(("user", said)) if isinstance(said, str) else said


def generation(agent_id: str, said: str | v1.Content | None, fields: dict[str, Any]) -> v1.GenerateRequest:
    request = v1.GenerateRequest(agent_id=agent_id, content=from_user(said), **fields)
    if request.agent_id and not request.ephemeral:
        identify(request)
    return request


def identify(request: Message) -> None:
    """Give a request that changes something an id, so that sending it again does nothing twice."""
    if not request.request_id:  # type: ignore[attr-defined]
        request.request_id = uuid.uuid4().hex  # type: ignore[attr-defined]
