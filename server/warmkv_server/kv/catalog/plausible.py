"""What can be true of an agent, whoever says so: a manifest, a row, an archive.

A checksum says that a file is as it was written, not that what was written makes sense. Values that the API would have
refused are damage here: they would fail later, in whatever first takes them for good.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from warmkv_server.contract.names import AGENT_ID, HIDDEN_ID
from warmkv_server.kv.blocks.names import EXTRA_KEY_BYTES
from warmkv_server.kv.index.records import TokenIds

NODE_ID = re.compile(r"[0-9a-f]{32}")
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_FINGERPRINT = NODE_ID
_LAST_REVISION = (1 << 63) - 1
_LAST_TIME = 250_000_000_000.0
"""Seconds since 1970. With a lifetime of a hundred years on top, still a time that the API can tell."""
_LONGEST_TTL = 100 * 365 * 86400.0
_TEXT_LIMIT = 1024
ENDING_LIMIT = 1 << 20
"""Characters of an ending, which may have messages that wait for the next."""
_LABELS, _KEY_LIMIT, _VALUE_LIMIT = 64, 63, 255


class AgentLike(Protocol):
    """What an agent and its manifest have in common."""

    @property
    def tenant(self) -> str: ...
    @property
    def agent_id(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def revision(self) -> int: ...
    @property
    def kept(self) -> tuple[int, ...]: ...
    @property
    def previous(self) -> int: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def ttl(self) -> float | None: ...
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def create_time(self) -> float: ...
    @property
    def update_time(self) -> float: ...
    @property
    def last_used(self) -> float: ...
    @property
    def parent_agent_id(self) -> str: ...
    @property
    def ending(self) -> str: ...


def violation(agent: AgentLike, length: int) -> str | None:
    """What can't be, in a few words; None if everything can.

    Args:
        length: tokens of its context.
    """
    times = (agent.create_time, agent.update_time, agent.last_used)
    rules = {
        "its tenant is no text": is_text(agent.tenant),
        "its agent_id can't be one": is_text(agent.agent_id)
        and (AGENT_ID.fullmatch(agent.agent_id) or HIDDEN_ID.fullmatch(agent.agent_id)),
        "its fingerprint is none": is_text(agent.fingerprint) and _FINGERPRINT.fullmatch(agent.fingerprint),
        "its revision can't be one": _is_count(agent.revision, 1, _LAST_REVISION),
        "its boundaries are not of this context": all(_is_count(b, 0, length) for b in (*agent.kept, agent.previous)),
        "its pin is neither on nor off": isinstance(agent.pinned, bool),
        "its ttl is no lifetime": agent.ttl is None or (_is_number(agent.ttl) and 0 < agent.ttl <= _LONGEST_TTL),
        "its times can't be": all(_is_number(time) and 0 <= time <= _LAST_TIME for time in times),
        "its labels can't be": _are_labels(agent.labels),
        "its parent can't be one": agent.parent_agent_id == ""
        or (is_text(agent.parent_agent_id) and AGENT_ID.fullmatch(agent.parent_agent_id)),
        "its ending is no text": is_text(agent.ending, ENDING_LIMIT),
    }
    return next((wrong for wrong, good in rules.items() if not good), None)


def token_violation(tokens: TokenIds, vocabulary: int | None) -> str | None:
    """
    Args:
        vocabulary: ids run from 0 to one below it; None if nobody knows.
    """
    if not len(tokens):
        return None
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or (vocabulary is not None and most >= vocabulary):
        return f"it has a token {least if least < 0 else most}, which the model doesn't have"
    return None


def span_violation(spans: Sequence[tuple[str, int, int]], block_tokens: int) -> str | None:
    """
    Args:
        spans: id, first token and end of each node of a context.
    """
    at = 0
    for ident, start, end in spans:
        if not (is_text(ident) and NODE_ID.fullmatch(ident)):
            return "it has a node whose id is none"
        if not _is_count(end, at + 1, at - at % block_tokens + block_tokens) or start != at:
            return f"its node {ident} doesn't continue the context at token {at}"
        at = end
    return None


def is_text(value: object, limit: int = _TEXT_LIMIT) -> bool:
    if not isinstance(value, str) or len(value) > limit:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which no message can carry
        return False
    return True


def is_extra_key(value: object) -> bool:
    """In hex."""
    return isinstance(value, str) and len(value) <= 2 * EXTRA_KEY_BYTES and _HEX.fullmatch(value) is not None


def _is_count(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _are_labels(labels: object) -> bool:
    if not isinstance(labels, Mapping) or len(labels) > _LABELS:
        return False
    return all(
        is_text(key) and is_text(value) and 1 <= len(key) <= _KEY_LIMIT and len(value) <= _VALUE_LIMIT
        for key, value in labels.items()
    )
