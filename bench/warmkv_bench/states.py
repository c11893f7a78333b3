"""Makes the states that are measured, and notes whatever shows that one was not made."""

from __future__ import annotations

from dataclasses import dataclass, field

from warmkv import v1 as pb
from warmkv_bench.client import Client, generation, tokens_content
from warmkv_bench.config import State

# Readable pages left after the page cache was dropped, as a part of the stored bytes: above this it was not dropped.
DROPPED = 0.01
NOT_CONTROLLED = "not controlled"


@dataclass(slots=True)
class Made:
    """An agent in a state, ready to be measured.

    Attributes:
        stored_bytes: `warm_bytes` of the agent.
        page_cache: "dropped" or "not controlled" where the state asks for dropped pages; else empty.
        resident_bytes: what the page cache still held of the agent's files; None if unknown or not asked.
        faults: what shows that the state was not made.
    """

    agent_id: str
    stored_bytes: int = 0
    page_cache: str = ""
    resident_bytes: int | None = None
    faults: list[str] = field(default_factory=list)


async def bring(client: Client, state: State, agent: pb.Agent, suffix: list[int]) -> Made:
    """Brings a primed agent, or a fork of one, into a state other than cold.

    For RESTART there is nothing to do here: the server's restart makes it.
    """
    made = Made(agent.agent_id, stored_bytes=agent.warm_bytes)
    if state == State.HOT:
        await _heat(client, agent, suffix, made)
    elif state in (State.WARM, State.WARM_DROPPED):
        await _evict(client, made, drop=state == State.WARM_DROPPED)
    return made


async def _heat(client: Client, agent: pb.Agent, suffix: list[int], made: Made) -> None:
    """Loads the agent into RAM if an eviction before it has dropped the blocks that it shares."""
    if agent.tier != pb.TIER_HOT:
        content = tokens_content(suffix)
        await client.generate(generation(agent.agent_id, content, 1, ephemeral=True))
        agent = await client.agent(agent.agent_id)
    if agent.tier != pb.TIER_HOT:
        made.faults.append("the agent is not in RAM: the hot tier may be too small for it (--hot-bytes)")


async def _evict(client: Client, made: Made, *, drop: bool) -> None:
    reply = await client.evict(made.agent_id, drop_page_cache=drop)
    made.stored_bytes = reply.agent.warm_bytes
    made.resident_bytes = reply.resident_bytes_after if reply.resident_bytes_after >= 0 else None
    if reply.agent.tier != pb.TIER_WARM or reply.agent.hot_bytes:
        made.faults.append(
            f"after its eviction the agent is {pb.Tier.Name(reply.agent.tier)} and has {reply.agent.hot_bytes} bytes "
            "in RAM"
        )
    if drop:
        gone = made.resident_bytes is not None and made.resident_bytes <= DROPPED * made.stored_bytes
        made.page_cache = "dropped" if gone else NOT_CONTROLLED
