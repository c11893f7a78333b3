"""Eviction from RAM: of one agent by hand, or of as many as it takes when memory is short.

The budget of RAM is the hot tier's own affair.
"""

from __future__ import annotations

from warmkv_server.errors import AgentDeleted, NotDurable
from warmkv_server.kv.index.index import Agent
from warmkv_server.kv.index.records import Evicted
from warmkv_server.kv.tasks.core import Core


class Eviction:
    """Used on the event loop's thread."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def evict(self, tenant: str, agent_id: str, drop_page_cache: bool) -> Evicted:
        """See `Store.evict`."""
        core = self._core
        agent = core.existing(tenant, agent_id)
        if not agent.durable:
            raise NotDurable(
                f"the last commit of agent {agent_id!r} is in RAM only, because the disk refused it; "
                "free disk space, and it is written by itself",
                agent_id=agent_id,
            )
        nodes = list(agent.all_nodes())
        names = [name for node in nodes for name in node.object_names()]
        before = await core.reading(core.tier.resident_bytes, names)
        self._require_same(agent)
        counted = core.accounts.evictions
        freed = sum(core.hot.drop(node) for node in nodes)
        core.counters.evictions += bool(freed) and core.accounts.evictions == counted  # only a part of it was in RAM
        if drop_page_cache:
            await core.reading(core.tier.drop_pages, names)
        after = await core.reading(core.tier.resident_bytes, names) if drop_page_cache else before
        self._require_same(agent)
        return Evicted(core.record(agent), freed, before, after)

    def relieve(self) -> int:
        """See `Store.relieve`."""
        hot = self._core.hot
        before = hot.nbytes
        hot.shrink(before // 2, pinned_too=False)
        return before - hot.nbytes

    def _require_same(self, agent: Agent) -> None:
        if self._core.index.agents.get(agent.key) is not agent:
            raise AgentDeleted(f"agent {agent.agent_id!r} was deleted while it was evicted", agent_id=agent.agent_id)
