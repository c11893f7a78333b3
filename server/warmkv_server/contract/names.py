"""What agents may be called, and which one is meant. A name never becomes one of a file."""

from __future__ import annotations

import re
import secrets
from typing import NamedTuple

AGENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
HIDDEN_ID = re.compile(r"~[0-9a-f]{32}")
"""Of a context that a request without an agent left behind; no client can say it."""
AGENT_ID_RULE = "must be 1 to 128 characters of A-Z a-z 0-9 . _ : -"


class AgentKey(NamedTuple):
    """One agent of one tenant. An empty agent_id names no agent: the request keeps nothing."""

    tenant: str
    agent_id: str


def hidden_id() -> str:
    """A new agent_id for a context that nobody can ask for by name."""
    return f"~{secrets.token_hex(16)}"


def is_hidden(agent_id: str) -> bool:
    return agent_id.startswith("~")
