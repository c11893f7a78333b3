"""Splicing: a history that comes back as text gets the tokens it was sampled with.

A client that sends everything again sends text, and tokenising it anew doesn't always give the tokens that the model
sampled: from the first other one on, nothing of what is kept could be reused. Where held tokens say the same as those
of the request, they take their place, from the start of the context up to where the texts differ: all earlier answers
at once. What the model reads stays the same text.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np

from warmkv_server.agents.compute import Tools
from warmkv_server.agents.context import Context
from warmkv_server.contract.names import AgentKey
from warmkv_server.engine.output.same_text import common_length
from warmkv_server.kv.store import TokenIds

_LOOKED_AT = 16
"""Contexts of requests without an agent that may be the one that is gone on with."""


async def spliced(tools: Tools, key: AgentKey, context: Context) -> Context:
    """The context with held tokens in the place of those that say the same, where less is to be computed then."""
    tokens = context.tokens
    # The last token is computed in any case, and how a prompt ends decides how its answer begins.
    wanted = tokens[: len(tokens) - max(1, context.thinks)]
    hopeful = []
    for held in _held(tools, key, wanted):
        common = common_length(held, wanted)
        if common < min(len(held), len(wanted)) and tools.engine.may_say_the_same(held, wanted, common):
            hopeful.append(held)
    same = await tools.engine.same_text() if hopeful else None
    if same is None:
        return context
    number, alike = await asyncio.to_thread(same.best, hopeful, wanted)
    other = np.concatenate([hopeful[number][: alike.held], tokens[alike.wanted :]])
    fits = len(other) <= tools.engine.info.context_limit
    if not alike.changed or not fits or _to_compute(tools, key, other) >= _to_compute(tools, key, tokens):
        return context
    return replace(context, tokens=other, spliced=alike.changed)


def _held(tools: Tools, key: AgentKey, wanted: TokenIds) -> list[TokenIds]:
    """What it may go on with."""
    if not key.agent_id:
        return tools.store.hidden_like(key.tenant, wanted, _LOOKED_AT)
    agent = tools.store.agent(*key)
    return [tools.store.tokens(*key)] if agent is not None and agent.fingerprint_ok else []


def _to_compute(tools: Tools, key: AgentKey, tokens: TokenIds) -> int:
    with tools.store.resolve(key.tenant, key.agent_id, tokens, len(tokens) - 1) as lease:
        return len(tokens) - lease.length
