"""WarmKV for clients: the stubs of the contract (`v1`), and a thin client on them (`client`)."""

from __future__ import annotations

from typing import Any

ROUTING_KEY = "warmkv-agent-id"
"""Metadata that names a request's agent, for routers, which can't read the request."""


def agent_of(request: Any) -> str | None:
    """The agent_id in a request of `v1`; None of one that is about no agent, such as ListAgentsRequest."""
    agent_id: str | None = getattr(getattr(request, "agent", request), "agent_id", None)
    return agent_id
