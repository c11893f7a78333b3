"""Fork, evict and delete: what changes an agent without computing anything."""

from __future__ import annotations

from warmkv_server.agents.compute import Tools
from warmkv_server.agents.idempotency import ResponseCodec
from warmkv_server.agents.run import Run
from warmkv_server.agents.types import IDLE, AgentView, EvictResult, Identity
from warmkv_server.contract.names import AgentKey
from warmkv_server.errors import AgentDeleted, AgentExists, AgentNotFound
from warmkv_server.kv.store import AgentRecord, RequestOutcome


async def fork(
    tools: Tools,
    source: AgentKey,
    target: AgentKey,
    identity: Identity | None,
    codec: ResponseCodec[AgentView],
    run: Run[AgentView],
) -> None:
    """Publish the new agent.

    The source is read as it was last committed, whatever runs on it. The target is being made: what already works on
    an agent of that name goes first.
    """

    def write(agent: AgentRecord, persisted: bool) -> RequestOutcome:  # noqa: ARG001
        assert identity is not None
        return codec.outcome(identity, [AgentView(agent)])

    require(tools, source)
    if tools.store.agent(*target) is not None:
        raise AgentExists(
            f"there is an agent {target.agent_id!r} already; choose another agent_id, or delete it first",
            agent_id=target.agent_id,
        )
    async with tools.turns.take(target, run):
        with run.uninterrupted():
            record = await tools.store.fork(
                target.tenant, source.agent_id, target.agent_id, write if identity is not None else None
            )
    run.publish(AgentView(record))


async def evict(tools: Tools, key: AgentKey, drop_page_cache: bool, run: Run[EvictResult]) -> None:
    """Publish what was freed, at the agent's turn."""
    async with tools.turns.take(key, run):
        run.doing = IDLE
        require(tools, key)
        evicted = await tools.store.evict(key.tenant, key.agent_id, drop_page_cache)
        run.publish(
            EvictResult(AgentView(evicted.agent), evicted.bytes_freed, evicted.resident_before, evicted.resident_after)
        )


async def delete(tools: Tools, key: AgentKey, allow_missing: bool, run: Run[None]) -> None:
    """Remove the agent before anything that arrives from now on, and end what works on it, or waits to.

    In this order: what a disk that refuses keeps alive goes on as if nobody had asked.
    """
    reason = AgentDeleted(f"the agent {key.agent_id!r} was deleted", agent_id=key.agent_id)
    with run.uninterrupted():
        async with tools.turns.overtake(key, run) as overtaking:
            run.doing = IDLE
            existed = await tools.store.delete(key.tenant, key.agent_id)
            stopped = await overtaking.stop(reason)
            # What was at work may have made the agent just now: then that is what was to be deleted.
            existed |= await tools.store.delete(key.tenant, key.agent_id)
    if not (existed or stopped or allow_missing):
        raise not_found(key)
    run.publish(None)


def require(tools: Tools, key: AgentKey) -> AgentRecord:
    """The agent's record, or AgentNotFound."""
    record = tools.store.agent(key.tenant, key.agent_id)
    if record is None:
        raise not_found(key)
    return record


def not_found(key: AgentKey) -> AgentNotFound:
    return AgentNotFound(f"there is no agent {key.agent_id!r}; ListAgents lists those there are", agent_id=key.agent_id)
