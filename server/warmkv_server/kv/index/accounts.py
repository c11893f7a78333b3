"""Bytes in use by agents, by tenants and by the directory, kept as they change: nothing is summed when somebody asks.

Whoever changes a node's files, what of it is in RAM, or who references it, does it here or tells it here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from warmkv_server.contract.kv import KVLayout, PartKind
from warmkv_server.kv.blocks.blockfile import Part
from warmkv_server.kv.index.hot import HotTier
from warmkv_server.kv.index.index import Agent, Index, Node
from warmkv_server.kv.index.prefix import kept_for, needed, overlaps


@dataclass(frozen=True)
class Sizes:
    """Of one agent; see `Agent`."""

    hot_bytes: int
    warm_bytes: int
    shared_bytes: int
    cold_parts: int


class Accounts:
    """Used on the event loop's thread.

    Attributes:
        block_bytes: of all files of the index's nodes.
        disk: the same by tenant.
        going: objects that no node has any more and that are still to be removed, by name, with their bytes.
        hot_agents: how many agents are in RAM, hidden ones not counted.
        evictions: agents that have left RAM so far; of the same.
        watchers: are told of each agent that comes, changes or goes, or whose KV does.
    """

    def __init__(self, index: Index, hot: HotTier, layout: KVLayout, fingerprint: str) -> None:
        """
        Args:
            hot: tells of everything that comes and goes.
        """
        self._index = index
        self._hot = hot
        self._layout = layout
        self._fingerprint = fingerprint
        self._policies = {policy.kind: policy for policy in layout.policies}
        self.block_bytes = 0
        self.disk: Counter[str] = Counter()
        self.going: dict[str, int] = {}
        self.going_bytes = 0
        self.hot_agents = 0
        self.evictions = 0
        self.watchers: list[Callable[[Agent], object]] = []
        for node in index.nodes.values():
            self._count(node, node.disk_bytes)
            if node.hidden:
                self._count_hidden(node, node.disk_bytes, 0)
        for agent in index.agents.values():
            self._assess(agent)
        hot.entered, hot.left = self._entered, self._left

    # Files

    def wrote(self, node: Node, kind: PartKind, part: Part) -> None:
        """A node has a file of this kind now."""
        node.parts[kind] = part
        self._resize(node, part.nbytes)
        if self.watchers and not self._hot.has(node, kind):
            self._tell(node.agents)

    def lost(self, node: Node, kind: PartKind) -> Part:
        """A node hasn't its file of this kind any more."""
        part = node.parts.pop(kind)
        self._resize(node, -part.nbytes)
        if self.watchers and not self._hot.has(node, kind):
            self._tell(node.agents)
        return part

    def enter(self, node: Node) -> None:
        """A node comes into the index, with the files that it has."""
        self._index.nodes[node.id] = node
        self._count(node, node.disk_bytes)

    def leave(self, node: Node) -> None:
        """A node that no agent references leaves the index; what still happens to it counts no more."""
        del self._index.nodes[node.id]
        self._count(node, -node.disk_bytes)

    def go(self, objects: Mapping[str, int]) -> None:
        """These are to be removed; until they are, the directory has them."""
        for name, nbytes in objects.items():
            self.going_bytes += nbytes - self.going.get(name, 0)
            self.going[name] = nbytes

    def gone(self, names: Iterable[str]) -> None:
        """These are removed, or belong to a node again."""
        for name in names:
            self.going_bytes -= self.going.pop(name, 0)

    def _resize(self, node: Node, nbytes: int) -> None:
        if self._index.nodes.get(node.id) is not node:
            return
        self._count(node, nbytes)
        if node.hidden:
            self._count_hidden(node, nbytes, 0)
        shared = nbytes if len(node.agents) > 1 else 0
        for agent in node.agents:
            agent.warm_bytes += nbytes
            agent.shared_bytes += shared

    def _count(self, node: Node, nbytes: int) -> None:
        self.block_bytes += nbytes
        self.disk[node.tenant] += nbytes
        if not self.disk[node.tenant]:
            del self.disk[node.tenant]

    def _count_hidden(self, node: Node, disk_bytes: int, hot_bytes: int) -> None:
        """Of a node that hidden agents alone reference, or don't any more."""
        self._index.hidden.nbytes[node.tenant] += disk_bytes
        self._hot.hidden_bytes += hot_bytes

    # RAM

    def _entered(self, node: Node, kind: PartKind, nbytes: int) -> None:
        """A part has come into RAM."""
        node.hot_bytes += nbytes
        if node.hidden:
            self._count_hidden(node, 0, nbytes)
        for agent in node.agents:
            agent.hot_bytes += nbytes
            if self._needs(agent, node, kind):
                agent.cold_parts -= 1
                self.hot_agents += _counts(agent)
        if self.watchers and kind not in node.parts:
            self._tell(node.agents)

    def _left(self, node: Node, kind: PartKind, nbytes: int) -> None:
        """A part has left RAM."""
        node.hot_bytes -= nbytes
        if node.hidden:
            self._count_hidden(node, 0, -nbytes)
        for agent in node.agents:
            agent.hot_bytes -= nbytes
            if self._needs(agent, node, kind):
                left = _counts(agent)
                agent.cold_parts += 1
                self.hot_agents -= left
                self.evictions += left
        if self.watchers and kind not in node.parts:
            self._tell(node.agents)

    def _needs(self, agent: Agent, node: Node, kind: PartKind) -> bool:
        """Whether the next request can't go on from the head of an agent of `node` without this part."""
        policy = self._policies.get(kind)
        if policy is None:
            return False
        head = len(agent.tokens)
        if policy.snapshot:
            return agent.snapshots.get(head) is node
        return policy.everywhere or overlaps(kept_for(policy, self._layout, head), node)

    # Agents

    def add(self, agent: Agent) -> None:
        """A new agent."""
        self._index.add_agent(agent)
        for node in set(agent.all_nodes()):
            self._share(node, agent, joined=True)
        self._assess(agent)
        self._tell([agent])

    def remove(self, agent: Agent) -> None:
        self._index.remove_agent(agent)
        self.hot_agents -= _counts(agent)
        for node in set(agent.all_nodes()):
            self._share(node, agent, joined=False)
        self._tell([agent])

    def take(self, agent: Agent, after: Agent) -> None:
        """An agent of the index becomes what `after` is."""
        old, new = set(agent.all_nodes()), set(after.all_nodes())
        self.hot_agents -= _counts(agent)
        self._index.take(agent, after)
        for node in new - old:
            self._share(node, agent, joined=True)
        for node in old - new:
            self._share(node, agent, joined=False)
        self._assess(agent)
        self._tell([agent])

    def _tell(self, agents: Iterable[Agent]) -> None:
        for watcher in self.watchers:
            for agent in agents:
                watcher(agent)

    def _share(self, node: Node, agent: Agent, *, joined: bool) -> None:
        """What the only other agent of a node has of it is shared from now on, or not any more."""
        if len(node.agents) == 1 + joined:
            (other,) = node.agents - {agent}
            other.shared_bytes += node.disk_bytes if joined else -node.disk_bytes
        # Hidden agents alone have a node from their first on to their last, or to the first that is named.
        sign = 0
        if agent.hidden:
            if not node.named_refs and len(node.agents) == joined:
                sign = 1 if joined else -1
        elif node.named_refs == joined and len(node.agents) > joined:
            sign = -1 if joined else 1
        if sign:
            self._count_hidden(node, sign * node.disk_bytes, sign * node.hot_bytes)

    def sized(self, agent: Agent) -> Agent:
        """An agent that is not in the index, with the sizes that it would have there."""
        sizes = self.measure(agent)
        agent.hot_bytes, agent.warm_bytes, agent.shared_bytes = sizes.hot_bytes, sizes.warm_bytes, sizes.shared_bytes
        agent.cold_parts = sizes.cold_parts
        return agent

    def _assess(self, agent: Agent) -> None:
        self.sized(agent)
        self.hot_agents += _counts(agent)

    def measure(self, agent: Agent) -> Sizes:
        """The sizes of an agent as it is, or as it would be in the index: summed, which takes a while."""
        present = self._index.agents.get(agent.key)
        hot = warm = shared = 0
        for node in agent.all_nodes():
            disk = node.disk_bytes
            hot += node.hot_bytes
            warm += disk
            shared += disk if len(node.agents) > (present in node.agents) else 0
        cold = sum(not self._hot.has(node, kind) for node, kind in self._needed(agent))
        return Sizes(hot, warm, shared, cold + (agent.fingerprint != self._fingerprint))

    def _needed(self, agent: Agent) -> Iterator[tuple[Node, PartKind]]:
        """What the next request that goes on from the head needs in RAM; see `_needs`."""
        head = len(agent.tokens)
        for policy in self._layout.policies:
            if not policy.snapshot:
                yield from ((node, policy.kind) for node in needed(policy, self._layout, agent.nodes, head))
            elif head in agent.snapshots:
                yield agent.snapshots[head], policy.kind


def _counts(agent: Agent) -> bool:
    """Whether it is one of the agents in RAM."""
    return not agent.cold_parts and not agent.hidden
