"""Agents that leave RAM: one by hand, or as many as it takes when memory is short; and how many have left.

The budget of RAM is the hot tier's own affair: what it has put out is found here when somebody asks for the count.
"""

from __future__ import annotations

from warmkv_server.errors import NotDurable
from warmkv_server.kv.core import Core
from warmkv_server.kv.index import Agent
from warmkv_server.kv.records import Evicted, Tier
from warmkv_server.kv.residency import drop_pages, resident_bytes
from warmkv_server.kv.types import Reuse


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
                "free disk space, and it is written by itself"
            )
        nodes = list(agent.all_nodes())
        paths = [core.path(node, kind) for node in nodes for kind in node.parts]
        before = await core.reading(resident_bytes, paths)
        freed = sum(core.hot.drop(node) for node in nodes)
        core.counters.evictions += bool(freed)
        core.was_hot.discard(agent)
        if drop_page_cache:
            await core.reading(drop_pages, paths)
        after = await core.reading(resident_bytes, paths) if drop_page_cache else before
        return Evicted(core.record(agent), freed, before, after)

    def relieve(self) -> int:
        """See `Store.relieve`."""
        hot = self._core.hot
        before = hot.nbytes
        hot.shrink(before // 2)
        return before - hot.nbytes

    def note_loaded(self, agent: Agent, reuse: Reuse) -> None:
        """It is in RAM; if it had to be read, it had left."""
        core = self._core
        if reuse.warm_tokens and agent in core.was_hot:
            core.counters.evictions += 1
        core.was_hot.add(agent)

    def note_cooled(self) -> None:
        """Count the agents that the memory budget has put out of RAM."""
        core = self._core
        cooled = {agent for agent in core.was_hot if core.tier(agent) is Tier.WARM}
        core.counters.evictions += len(cooled)
        core.was_hot -= cooled
