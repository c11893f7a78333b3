"""What agents may be called, and which one is meant. A name never becomes one of a file."""

from __future__ import annotations

import re
from typing import NamedTuple

AGENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
AGENT_ID_RULE = "must be 1 to 128 characters of A-Z a-z 0-9 . _ : -"


class AgentKey(NamedTuple):
    """One agent of one tenant. An empty agent_id names no agent: the request keeps nothing."""

    tenant: str
    agent_id: str
