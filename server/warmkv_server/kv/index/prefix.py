"""The longest usable prefix of a requested context: found, and held while the request runs.

The agent's own comes first, then what others of the tenant have. From memory alone. Whatever is found by hash is
compared token by token, so no collision can hand out another context.

A kept context can be taken up again at some lengths, its boundaries: with append-only layers alone, at any. Windowed
layers need the entries of the last `window` tokens there, recurrent ones a snapshot captured exactly there; both are
kept at few lengths, because they are only of use at those. What a boundary needs of a kind, the kind's policy says.

Windows are kept in whole blocks: what lies in the block of a boundary is complete, so merging its segments never lacks
an entry.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from warmkv_server.contract.kv import BLOCK_TOKENS, Fallback, KindPolicy, KVLayout, PartKind, Ranges
from warmkv_server.kv.blocks.names import TOKEN_BYTES, block_of, node_id
from warmkv_server.kv.index.index import Agent, Index, Node, PartOf, common_length, common_tokens
from warmkv_server.kv.index.records import TokenIds

MAX_KEPT = 4
"""Boundaries an agent keeps besides its head, the one before, and those inside long turns (`inner_boundaries`): the
latest asked for. More would cost disk without bound."""

Has = Callable[[Node, PartKind], bool]
"""Whether a node's part can be had, from RAM or disk."""


@dataclass(frozen=True)
class Under:
    """What a context hangs from: the root of its tenant and fingerprint, and what its KV is a function of besides."""

    root: bytes
    extra_key: bytes = b""


@dataclass(frozen=True)
class Prefix:
    """A usable prefix: `nodes` cover it, the last may reach beyond."""

    length: int = 0
    nodes: tuple[Node, ...] = ()
    snapshot: Node | None = None


def kept_for(policy: KindPolicy, layout: KVLayout, boundary: int) -> Ranges:
    """The tokens whose entries are kept for this boundary: whole blocks, as far as the context goes."""
    return tuple(
        range(block_of(each.start), min(block_of(each.stop - 1) + BLOCK_TOKENS, boundary))
        for each in policy.needs(layout, boundary)
        if each
    )


def overlaps(ranges: Ranges, node: Node) -> bool:
    """Whether some of a node's tokens are among these."""
    return any(node.end > each.start and node.start < each.stop for each in ranges)


def needed(policy: KindPolicy, layout: KVLayout, nodes: Sequence[Node], boundary: int) -> list[Node]:
    """The nodes whose parts of a kind this boundary needs.

    Args:
        nodes: of a context, in order.
    """
    found: list[Node] = []
    done = 0
    for each in kept_for(policy, layout, boundary):
        first = max(done, bisect_right(nodes, each.start, key=lambda node: node.end))
        done = max(first, bisect_left(nodes, each.stop, key=lambda node: node.start))
        found += nodes[first:done]
    return found


def partly_kept(layout: KVLayout, nodes: Sequence[Node], boundaries: Iterable[int]) -> set[PartOf]:
    """The parts, of kinds that not every node has, that these boundaries need."""
    lengths = sorted(boundaries)
    return {
        (node, policy.kind)
        for policy in layout.partial
        for boundary in lengths
        for node in needed(policy, layout, nodes, boundary)
    }


def longest_usable(index: Index, layout: KVLayout, nodes: Sequence[Node], reach: int, under: Under, has: Has) -> Prefix:
    """The longest prefix, of at most `reach` tokens, of the context of `nodes` that can be taken up.

    Args:
        nodes: contiguous from token 0, with the parts that every node has at hand; `reach` lies in or at the end of
            the last.
        under: what the first node would continue, if there is none.
    """
    if nodes:
        under = Under(nodes[0].parent, under.extra_key)  # Not the tenant's own root where the context was imported.
    snapshot: Node | None = None
    while reach:
        if layout.snapshots:
            snapshot = _latest_snapshot(index, layout, nodes, reach, under, has)
            reach = snapshot.end if snapshot is not None else 0
        length = reach
        for policy in layout.partial:
            length = _reach_of(policy, layout, nodes, length, has)
        if length == reach:
            return Prefix(length, _covering(nodes, length), snapshot)
        reach = length
    return Prefix()


def _reach_of(policy: KindPolicy, layout: KVLayout, nodes: Sequence[Node], reach: int, has: Has) -> int:
    """The last length <= reach for which all parts of a kind are at hand. Where one is lacking, so it is for every
    length between it and there: see `KindPolicy.needs`."""
    while reach:
        lacking = (n for n in needed(policy, layout, nodes, reach) if not has(n, policy.kind))
        first = next(lacking, None)
        if first is None:
            return reach
        reach = first.start
    return 0


def _latest_snapshot(
    index: Index, layout: KVLayout, nodes: Sequence[Node], reach: int, under: Under, has: Has
) -> Node | None:
    """The snapshot of the longest prefix <= reach that has one."""
    # Snapshots hang below the full block before them; go through these from the last to the root.
    last_in_block = {node.block_start: node for node in nodes}
    parents = [(0, under.root), *((node.end, node.id) for node in nodes if node.full)]
    for begin, parent in reversed(parents):
        inside = last_in_block.get(begin)
        tokens = inside.block_tokens if inside is not None else b""
        found = [
            snapshot
            for snapshot in index.snapshots_after(parent, under.extra_key)
            if snapshot.end <= reach
            and tokens.startswith(snapshot.block_tokens)
            and all(has(snapshot, kind) for kind in layout.snapshots)
        ]
        if found:
            return max(found, key=lambda snapshot: snapshot.end)
    return None


def _covering(nodes: Sequence[Node], length: int) -> tuple[Node, ...]:
    return tuple(node for node in nodes if node.start < length)


@dataclass(frozen=True)
class Match:
    """
    Attributes:
        own_nodes: how many of the prefix's nodes, from the first, the agent references itself.
        fallback: why it is shorter than what the agent's own context has in common with the request.
    """

    prefix: Prefix
    own_nodes: int
    fallback: Fallback | None


@dataclass(frozen=True)
class _Chain:
    nodes: list[Node]
    reach: int


class Matcher:
    def __init__(self, index: Index, layout: KVLayout, has: Has) -> None:
        self._index = index
        self._layout = layout
        self._has = has

    def match(self, agent: Agent | None, under: Under, fingerprint: str, wanted: TokenIds) -> Match:
        """
        Args:
            agent: whose context comes first, if there is one.
            under: the tenant's root for the fingerprint, and the request's extra key.
            wanted: the requested tokens, cut to as many as may be reused.
        """
        same = agent is not None and agent.extra_key == under.extra_key
        common = common_length(agent.tokens, wanted) if agent is not None and same else 0
        own, lost = _Chain([], 0), None
        if agent is not None and agent.fingerprint == fingerprint:
            own, lost = self._own(agent, common)
        raw = wanted.astype("<i4").tobytes()
        best = self._usable(own, under)
        shared = self._shared(own, under, raw)
        if shared.reach > best.length:
            other = self._usable(shared, under)
            if other.length > best.length:
                best = other
        fallback = None
        if agent is not None and best.length < common:
            foreign = agent.fingerprint != fingerprint
            fallback = Fallback.FINGERPRINT if foreign else lost or Fallback.NOT_TRIMMABLE
        own_ids = {node.id for node in own.nodes}
        own_nodes = next((i for i, node in enumerate(best.nodes) if node.id not in own_ids), len(best.nodes))
        return Match(best, own_nodes, fallback)

    def _usable(self, chain: _Chain, under: Under) -> Prefix:
        return longest_usable(self._index, self._layout, chain.nodes, chain.reach, under, self._has)

    def _is_at_hand(self, node: Node) -> bool:
        """Whether it has what every node has to have."""
        return all(self._has(node, kind) for kind in self._layout.everywhere)

    def _own(self, agent: Agent, common: int) -> tuple[_Chain, Fallback | None]:
        """The agent's nodes as far as they are wanted and at hand, and why they end earlier if they do."""
        nodes: list[Node] = []
        for node in agent.nodes:
            if node.start >= common:
                break
            if not self._is_at_hand(node):
                return _Chain(nodes, node.start), node.lost or Fallback.MISSING_BLOCK
            nodes.append(node)
        return _Chain(nodes, common), None

    def _shared(self, own: _Chain, under: Under, raw: bytes) -> _Chain:
        """The agent's own full blocks, as many more full blocks as anybody has, and the likest tail behind them."""
        nodes = [node for node in own.nodes if node.full and node.end <= own.reach]
        position, parent = (nodes[-1].end, nodes[-1].id) if nodes else (0, under.root)
        block = BLOCK_TOKENS * TOKEN_BYTES
        while len(tokens := raw[position * TOKEN_BYTES : position * TOKEN_BYTES + block]) == block:
            node = self._index.live(node_id(parent, position, tokens, under.extra_key))
            if node is None or node.block_tokens != tokens or not self._is_at_hand(node):
                break
            nodes.append(node)
            position, parent = node.end, node.id
        reach = position
        for node in self._index.tail_like(parent, tokens, under.extra_key):
            if not self._is_at_hand(node):
                break
            nodes.append(node)
            reach = position + min(common_tokens(node.block_tokens, tokens), node.end - position)
        return _Chain(nodes, reach)


@dataclass
class Lease:
    """The nodes that cover the longest usable prefix of a requested context, kept from collection until released.

    Attributes:
        tokens: the requested context, whole.
        incarnation: of the agent, or None if it doesn't exist.
        length: tokens promised. `Store.load` may shorten it.
        nodes: in order; they cover [0, length), and the last may reach beyond.
        own_nodes: how many of them, from the first, are in the agent's own context.
        snapshot: the node with the recurrent state after `length` tokens, for models that have one.
        extra_key: what the context's KV is a function of besides the tokens and the fingerprint.
        fallback: why it is shorter than what the agent's own context has in common with the request, if it is.
    """

    tenant: str
    agent_id: str
    tokens: TokenIds
    incarnation: int | None
    length: int = 0
    nodes: list[Node] = field(default_factory=list)
    own_nodes: int = 0
    snapshot: Node | None = None
    fallback: Fallback | None = None
    extra_key: bytes = b""
    on_release: Callable[[Iterable[Node]], None] | None = None
    _pinned: list[Node] = field(default_factory=list)
    _agent: Agent | None = None

    def hold(self, agent: Agent) -> None:
        """Keep the agent from expiring until the lease is released."""
        agent.leases += 1
        self._agent = agent

    def pin(self, *nodes: Node) -> None:
        """Keep these from collection until the lease is released."""
        for node in nodes:
            node.pins += 1
        self._pinned += nodes

    def release(self) -> None:
        """Let go. Doing so twice is harmless."""
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.leases -= 1
        pinned, self._pinned = self._pinned, []
        for node in pinned:
            node.pins -= 1
        if pinned and self.on_release is not None:
            self.on_release(pinned)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
