"""The index of all that is kept, in RAM: nodes, agents, and reference counts.

The journal is the durable log of this. Nothing here blocks or awaits.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from warmkv_server.contract.kv import BLOCK_TOKENS, Fallback, PartKind, policy_of
from warmkv_server.contract.names import AgentKey, is_hidden
from warmkv_server.kv.blocks.blockfile import BlockInfo, Part
from warmkv_server.kv.blocks.names import TOKEN_BYTES, block_of, object_name
from warmkv_server.kv.index.hidden import HiddenAgents
from warmkv_server.kv.index.records import TokenIds

PartOf = tuple["Node", PartKind]
"""A node's part of a kind, wherever it is."""


@dataclass(eq=False, slots=True)
class Node:
    """A stretch of one context, at most a block long, whose KV is kept as one file for each kind.

    A node without tokens (start == end) is a snapshot: it carries the recurrent state after `end` tokens.

    Attributes:
        row: its number in the journal.
        saved: the journal has a row of it.
        dirty: the row, if there is one, is not as the node is now.
        parent: id of the full block before it, or the root's.
        block_tokens: int32 ids from the start of its block to its end.
        extra_key: what the KV is a function of besides the tokens and the fingerprint; empty for nothing.
        parts: files on disk.
        lost: why a file it should have is gone.
        agents: that reference it. Without any it is never reused, only collected.
        pins: leases and commits that are working with it, and manifests on disk that alone refer to it still.
        part_refs: agents that need its part of a kind that not every node has, by kind; 0 where it can be evicted.
        pinned_refs, named_refs: pinned agents that reference it, and agents that are not hidden.
        hot_bytes: its parts in RAM.
        last_used: of the store's time (see clock.py).
    """

    id: bytes
    row: int
    tenant: str
    fingerprint: str
    parent: bytes
    start: int
    block_tokens: bytes
    parts: dict[PartKind, Part] = field(default_factory=dict)
    lost: Fallback | None = None
    saved: bool = False
    dirty: bool = True
    agents: set[Agent] = field(default_factory=set)
    pins: int = 0
    part_refs: Counter[PartKind] = field(default_factory=Counter)
    pinned_refs: int = 0
    named_refs: int = 0
    hot_bytes: int = 0
    last_used: float = 0.0
    extra_key: bytes = b""

    def spare_parts(self) -> list[PartKind]:
        """Of its files, those of kinds that not every node has, and that no agent needs here."""
        return [kind for kind in self.parts if policy_of(kind).partial and not self.part_refs[kind]]

    def object_names(self) -> list[str]:
        """What its files are called."""
        return [self.object_name(kind, part) for kind, part in self.parts.items()]

    def object_name(self, kind: PartKind, part: Part) -> str:
        return object_name(self.id.hex(), kind, part.digest)

    @property
    def refs(self) -> int:
        """The reference count: of agents."""
        return len(self.agents)

    @property
    def block_start(self) -> int:
        return block_of(self.start)

    @property
    def end(self) -> int:
        return self.block_start + len(self.block_tokens) // TOKEN_BYTES

    @property
    def count(self) -> int:
        return self.end - self.start

    @property
    def own_tokens(self) -> bytes:
        return self.block_tokens[(self.start - self.block_start) * TOKEN_BYTES :]

    @property
    def disk_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def family(self) -> bytes:
        """The same for nodes that continue one context in different ways."""
        return self.parent + self.extra_key

    @property
    def snapshot(self) -> bool:
        return self.count == 0

    @property
    def full(self) -> bool:
        return self.count == BLOCK_TOKENS

    @property
    def hidden(self) -> bool:
        """Whether hidden agents reference it, and no others."""
        return not self.named_refs and bool(self.agents)


@dataclass(eq=False, slots=True)
class Agent:
    """One agent's committed context.

    Attributes:
        nodes: in order, covering [0, len(tokens)).
        snapshots: by length of the context; all of boundaries() where the model has recurrent state.
        partial: the parts that it needs of kinds that not every node has.
        kept: boundaries to keep until the context is cut below them, ascending.
        previous: the head before the last commit, while it is still a prefix; 0 for none.
        durable: the journal has exactly this state, and the files are there.
        saved: the journal has some state of it.
        deleting: its deletion is on its way to the journal; nothing may be committed to it.
        create_time, update_time, last_used: of the store's time (see clock.py).
        leases: requests that work on it now; it doesn't expire meanwhile.
        hot_bytes, warm_bytes, shared_bytes: as in `AgentRecord`. These and the next are `Accounts`' to change.
        cold_parts: that have to be read, or computed anew, before a request can go on from the head; 0 is hot.
        hidden: whether no client can name it.
    """

    tenant: str
    agent_id: str
    incarnation: int
    fingerprint: str
    tokens: TokenIds = field(default_factory=lambda: np.zeros(0, np.int32))
    nodes: list[Node] = field(default_factory=list)
    snapshots: dict[int, Node] = field(default_factory=dict)
    partial: set[PartOf] = field(default_factory=set)
    kept: tuple[int, ...] = ()
    previous: int = 0
    revision: int = 1
    pinned: bool = False
    ttl: float | None = None
    labels: dict[str, str] = field(default_factory=dict)
    create_time: float = 0.0
    update_time: float = 0.0
    last_used: float = 0.0
    parent_agent_id: str = ""
    ending: str = ""
    durable: bool = False
    saved: bool = False
    deleting: bool = False
    leases: int = 0
    hot_bytes: int = 0
    warm_bytes: int = 0
    shared_bytes: int = 0
    cold_parts: int = 0
    hidden: bool = field(init=False)

    def __post_init__(self) -> None:
        self.hidden = is_hidden(self.agent_id)

    @property
    def key(self) -> AgentKey:
        return AgentKey(self.tenant, self.agent_id)

    @property
    def extra_key(self) -> bytes:
        """What its KV is a function of besides the tokens."""
        return self.nodes[0].extra_key if self.nodes else b""

    @property
    def expires(self) -> float | None:
        return None if self.ttl is None else self.last_used + self.ttl

    def all_nodes(self) -> Iterator[Node]:
        yield from self.nodes
        yield from self.snapshots.values()


_COMMITTED = (
    *("fingerprint", "tokens", "nodes", "snapshots", "partial", "kept", "previous", "ending", "revision"),
    *("ttl", "labels", "update_time", "last_used"),
)
"""What a commit may change of an agent, its pin apart."""


class Index:
    """Nodes by id and by what they continue; agents by name."""

    def __init__(self) -> None:
        self.nodes: dict[bytes, Node] = {}
        self.agents: dict[AgentKey, Agent] = {}
        self.implausible: list[tuple[Agent, str]] = []
        """Agents of the journal with values that can't be, and what; they are not among `agents`."""
        self.hidden = HiddenAgents()
        self.next_row = 1
        self.next_incarnation = 1
        self._names: defaultdict[str, list[str]] = defaultdict(list)
        # Referenced nodes by family, sorted by tokens: the neighbours of a query share the longest prefix with it.
        self._families: defaultdict[bytes, list[tuple[bytes, int, bytes]]] = defaultdict(list)
        self._snapshots: defaultdict[bytes, list[Node]] = defaultdict(list)

    # Agents

    def add_agent(self, agent: Agent) -> None:
        self.agents[agent.key] = agent
        if agent.hidden:
            self.hidden.add(agent)
        else:
            insort(self._names[agent.tenant], agent.agent_id)
        self._reference(set(agent.all_nodes()), agent)
        for node, kind in agent.partial:
            node.part_refs[kind] += 1

    def remove_agent(self, agent: Agent) -> None:
        """Forget it. Its nodes stay until they are collected."""
        del self.agents[agent.key]
        if agent.hidden:
            self.hidden.remove(agent)
        else:
            names = self._names[agent.tenant]
            del names[bisect_left(names, agent.agent_id)]
        self._dereference(set(agent.all_nodes()), agent)
        for node, kind in agent.partial:
            node.part_refs[kind] -= 1

    def set_pinned(self, agent: Agent, pinned: bool) -> None:
        for node in agent.all_nodes():
            node.pinned_refs += pinned - agent.pinned
        agent.pinned = pinned

    def take(self, agent: Agent, after: Agent) -> None:
        """Give an agent of the index the context and the options of another, which is not in the index."""
        old, new = set(agent.all_nodes()), set(after.all_nodes())
        self._reference(new - old, agent)
        self._dereference(old - new, agent)
        for node, kind in after.partial - agent.partial:
            node.part_refs[kind] += 1
        for node, kind in agent.partial - after.partial:
            node.part_refs[kind] -= 1
        for name in _COMMITTED:
            setattr(agent, name, getattr(after, name))
        self.set_pinned(agent, after.pinned)

    def names(self, tenant: str, after: str) -> list[str]:
        """The tenant's agent ids behind `after`, sorted, but for hidden ones."""
        names = self._names.get(tenant, [])
        return names[bisect_right(names, after) if after else 0 :]

    def new_incarnation(self) -> int:
        self.next_incarnation += 1
        return self.next_incarnation - 1

    # Nodes

    def new_row(self) -> int:
        self.next_row += 1
        return self.next_row - 1

    def _reference(self, nodes: Iterable[Node], agent: Agent) -> None:
        named = not agent.hidden
        for node in nodes:
            node.pinned_refs += agent.pinned
            node.named_refs += named
            node.agents.add(agent)
            if len(node.agents) > 1:
                continue
            if node.snapshot:
                self._snapshots[node.family].append(node)
            else:
                insort(self._families[node.family], (node.block_tokens, node.start, node.id))

    def _dereference(self, nodes: Iterable[Node], agent: Agent) -> None:
        named = not agent.hidden
        for node in nodes:
            node.pinned_refs -= agent.pinned
            node.named_refs -= named
            node.agents.remove(agent)
            if node.agents:
                continue
            if node.snapshot:
                self._snapshots[node.family].remove(node)
                if not self._snapshots[node.family]:
                    del self._snapshots[node.family]
            else:
                family = self._families[node.family]
                del family[bisect_left(family, (node.block_tokens, node.start, node.id))]
                if not family:
                    del self._families[node.family]

    def live(self, ident: bytes) -> Node | None:
        """The node of this id, if an agent references it."""
        node = self.nodes.get(ident)
        return node if node is not None and node.agents else None

    def snapshots_after(self, parent: bytes, extra_key: bytes) -> list[Node]:
        """Referenced snapshots taken in the block that follows `parent`."""
        return self._snapshots.get(parent + extra_key, [])

    def family(self, parent: bytes, extra_key: bytes = b"") -> Sequence[tuple[bytes, int, bytes]]:
        """The nodes that continue `parent`, sorted by tokens: each one's tokens from where its block begins, its first
        token's place, and its id."""
        return self._families.get(parent + extra_key, ())

    def tail_like(self, parent: bytes, wanted: bytes, extra_key: bytes) -> list[Node]:
        """The nodes after `parent` that cover the longest common prefix of `wanted` with any context kept there.

        In order; the last may reach beyond the common prefix. Whoever references a segment also references the ones
        before it in its block, so the predecessors of the best match are here too.
        """
        family = self._families.get(parent + extra_key)
        if not family:
            return []
        at = bisect_left(family, (wanted, 0, b""))
        neighbours = family[max(at - 1, 0) : at + 1]
        best = max(neighbours, key=lambda entry: common_tokens(entry[0], wanted))
        reach = common_tokens(best[0], wanted)
        chain: list[Node] = []
        tokens, begin = best[0], best[1]
        node = self.nodes[best[2]]
        while True:
            chain.insert(0, node)
            offset = (begin - node.block_start) * TOKEN_BYTES
            if not offset:
                break
            tokens = tokens[:offset]
            found = family[bisect_left(family, (tokens, 0, b""))]
            assert found[0] == tokens, "a segment without its predecessor"
            node, begin = self.nodes[found[2]], found[1]
        return [node for node in chain if node.start < chain[0].start + reach]


def common_tokens(one: bytes, other: bytes) -> int:
    """Length of the common prefix of two token strings, in tokens."""
    size = min(len(one), len(other)) // TOKEN_BYTES
    a = np.frombuffer(one, "<i4", size)
    b = np.frombuffer(other, "<i4", size)
    return common_length(a, b)


def common_length(a: TokenIds, b: TokenIds) -> int:
    """Length of the common prefix of two contexts."""
    size = min(len(a), len(b))
    differing = np.flatnonzero(a[:size] != b[:size])
    return int(differing[0]) if len(differing) else size


def block_info(node: Node, kind: PartKind) -> BlockInfo:
    """What the header of a node's file has to say."""
    return BlockInfo(
        kind,
        node.id.hex(),
        node.parent.hex(),
        node.start,
        node.block_tokens,
        node.fingerprint,
        node.tenant,
        node.extra_key,
    )
