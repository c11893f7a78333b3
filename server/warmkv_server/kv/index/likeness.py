"""Which hidden agents' contexts begin a context, or begin as it does; found in the index's order of tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from heapq import nlargest

from warmkv_server.contract.kv import BLOCK_TOKENS
from warmkv_server.kv.blocks.names import TOKEN_BYTES, node_id
from warmkv_server.kv.index.index import Agent, Index, Node, common_tokens

_BLOCK = BLOCK_TOKENS * TOKEN_BYTES
_BEHIND = b"\0"
"""What stands behind some tokens in the order, and before any that go on with them."""


def beginnings(index: Index, agent: Agent) -> list[Agent]:
    """The other hidden agents whose whole context is what this agent's begins with, or all of it."""
    found: list[Agent] = []
    parent = agent.nodes[0].parent if agent.nodes else b""
    for node in agent.nodes:
        if node.full or node is agent.nodes[-1]:
            for end in _within(index, parent, node.block_tokens, agent.extra_key):
                found += [each for each in index.hidden.ending_with(end) if each is not agent]
        if node.full:
            parent = node.id
    return found


def alike(index: Index, root: bytes, wanted: bytes, most: int) -> list[Agent]:
    """Hidden agents whose contexts begin most like `wanted`: first those that are nearest to it where its last full
    block ends that anybody has, then those that have most blocks in common with it, the latest of them first.

    Args:
        wanted: int32 ids.
    """
    path: list[Node] = []
    parent = root
    while len(tokens := wanted[len(path) * _BLOCK : (len(path) + 1) * _BLOCK]) == _BLOCK:
        node = index.live(node_id(parent, len(path) * BLOCK_TOKENS, tokens, b""))
        if node is None:
            break
        path.append(node)
        parent = node.id
    found: dict[Agent, None] = {}
    first = _nearest(index, root, wanted[:_BLOCK], most) if path else []
    for node in (*_nearest(index, parent, tokens, most), *reversed(path), *first):
        if len(found) >= most:
            break
        if len(node.agents) > node.named_refs:
            hidden = (agent for agent in node.agents if agent.hidden)
            found |= dict.fromkeys(nlargest(most, hidden, key=lambda agent: (agent.last_used, agent.incarnation)))
    return list(found)[:most]


def _within(index: Index, parent: bytes, wanted: bytes, extra_key: bytes) -> Iterator[Node]:
    """The nodes after `parent` that end with what `wanted` begins with."""
    family = index.family(parent, extra_key)
    while wanted:
        at = bisect_left(family, (wanted + _BEHIND, 0, b"")) - 1
        if at < 0:
            return
        tokens = family[at][0]
        common = common_tokens(tokens, wanted) * TOKEN_BYTES
        if common < len(tokens):
            wanted = wanted[:common]  # what begins it, and comes before this one, is no longer than that
            continue
        first = bisect_left(family, (tokens, 0, b""))
        yield from (index.nodes[ident] for _, _, ident in family[first : at + 1])
        wanted = tokens[:-TOKEN_BYTES]


def _nearest(index: Index, parent: bytes, wanted: bytes, most: int) -> list[Node]:
    """Nodes after `parent`, those that have most tokens in common with `wanted` first."""
    family = index.family(parent)
    at = bisect_left(family, (wanted, 0, b""))
    near = sorted(family[max(at - most // 2, 0) : at + most // 2], key=lambda each: -common_tokens(each[0], wanted))
    return [index.nodes[ident] for _, _, ident in near]
