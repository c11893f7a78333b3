"""Finding the longest usable prefix of a requested context: the agent's own first, then what others of the tenant have.

From memory alone. Whatever is found by hash is compared token by token, so no collision can hand out another context.
"""

from __future__ import annotations

from dataclasses import dataclass

from warmkv_server.contract.kv import BLOCK_TOKENS, Fallback, KVLayout
from warmkv_server.kv.blocks.ids import TOKEN_BYTES, node_id
from warmkv_server.kv.index.boundaries import Has, Prefix, Under, longest_usable
from warmkv_server.kv.index.index import Agent, Index, Node, common_length, common_tokens
from warmkv_server.kv.index.records import TokenIds


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
