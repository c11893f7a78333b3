"""Which nodes a new context is made of: what is there already, what has to be made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from warmkv_server.contract.kv import BLOCK_TOKENS, KVLayout, PartKind, inner_boundaries
from warmkv_server.kv.blocks.names import TOKEN_BYTES, block_of, node_id
from warmkv_server.kv.index.index import Agent, Index, Node, PartOf, common_length
from warmkv_server.kv.index.prefix import MAX_KEPT, Has, needed, partly_kept
from warmkv_server.kv.index.records import Commit

MAX_SEGMENTS = 16
"""Segments behind the last full block; one more, and they are merged into one. Each is a file to open at a load."""


@dataclass
class Plan:
    """A context as the agent will reference it. Nodes that are not in the index yet have no files.

    Attributes:
        parts: every file that has to exist for it.
        kept, previous: boundaries, as in `Agent`.
    """

    nodes: list[Node]
    snapshots: dict[int, Node]
    partial: set[PartOf]
    parts: list[PartOf]
    kept: tuple[int, ...]
    previous: int

    def all_nodes(self) -> list[Node]:
        return [*self.nodes, *self.snapshots.values()]


class Planner:
    def __init__(self, index: Index, layout: KVLayout, fingerprint: str, has: Has) -> None:
        self._index = index
        self._layout = layout
        self._fingerprint = fingerprint
        self._has = has

    def plan(self, commit: Commit, agent: Agent | None, root: bytes) -> Plan:
        """Lay out `commit.tokens`. Changes nothing."""
        raw = commit.tokens.astype("<i4").tobytes()
        if commit.reuse.length:
            # What goes on with KV that was imported stays under its root, where no other agent finds it.
            root = commit.lease.nodes[0].parent
        nodes = self._full_blocks(commit, root, raw, [n for n in commit.lease.nodes if n.end <= commit.reuse.length])
        parent = nodes[-1].id if nodes else root
        nodes += self._tail(parent, raw, nodes[-1].end if nodes else 0, commit)
        kept, previous = self._boundaries(commit, agent)
        length = len(commit.tokens)
        snapshots = self._snapshots(commit, agent, raw, root, nodes, {length, previous, *kept} - {0})
        good = {b for b in (*kept, previous) if self._usable(b, nodes, snapshots, commit)}
        kept, previous = tuple(b for b in kept if b in good), previous if previous in good else 0
        boundaries = {length, previous, *kept} - {0}
        snapshots = {b: node for b, node in snapshots.items() if b in boundaries}
        partial = partly_kept(self._layout, nodes, boundaries)
        parts = [(node, kind) for kind in self._layout.everywhere for node in nodes]
        parts += [(n, policy.kind) for policy in self._layout.partial for n in nodes if (n, policy.kind) in partial]
        parts += [(node, kind) for kind in self._layout.snapshots for node in snapshots.values()]
        return Plan(nodes, snapshots, partial, parts, kept, previous)

    def _full_blocks(self, commit: Commit, root: bytes, raw: bytes, whole: Sequence[Node]) -> list[Node]:
        nodes: list[Node] = []
        for node in whole:
            if not node.full:
                break
            nodes.append(node)
        for start in range(nodes[-1].end if nodes else 0, block_of(len(raw) // TOKEN_BYTES), BLOCK_TOKENS):
            tokens = raw[start * TOKEN_BYTES : (start + BLOCK_TOKENS) * TOKEN_BYTES]
            nodes.append(self._node(commit, nodes[-1].id if nodes else root, start, tokens))
        return nodes

    def _tail(self, parent: bytes, raw: bytes, begin: int, commit: Commit) -> list[Node]:
        """The segments behind the last full block: those that are there, and one for the rest."""
        length = len(raw) // TOKEN_BYTES
        if begin == length:
            return []
        block = raw[begin * TOKEN_BYTES :]
        segments = [n for n in commit.lease.nodes if n.start >= begin and n.end <= commit.reuse.length]
        end = segments[-1].end if segments else begin
        if end == length:
            return segments
        if len(segments) >= MAX_SEGMENTS:
            segments, end = [], begin
        return [*segments, self._node(commit, parent, end, block)]

    def _boundaries(self, commit: Commit, agent: Agent | None) -> tuple[tuple[int, ...], int]:
        length = len(commit.tokens)
        inner: frozenset[int] = frozenset()
        if self._layout.partial or self._layout.has_state:
            inner = inner_boundaries(length)
        asked = {b for b in commit.keep_boundaries if 0 < b <= length}
        previous = 0
        if agent is not None and agent.fingerprint == self._fingerprint:
            same, head = min(common_length(agent.tokens, commit.tokens), commit.reuse.length), len(agent.tokens)
            asked |= {b for b in agent.kept if b <= same} - inner_boundaries(head)
            candidates = (head, agent.previous) if head != length else (agent.previous,)
            previous = next((b for b in candidates if b <= same), 0)
        return tuple(sorted({*sorted(asked)[-MAX_KEPT:], *inner})), previous

    def _usable(self, boundary: int, nodes: Sequence[Node], snapshots: Mapping[int, Node], commit: Commit) -> bool:
        """Whether all that this boundary needs is kept already or in this request's hands."""
        if self._layout.has_state and boundary not in snapshots:
            return False
        for policy in self._layout.partial:
            held = _held(commit, policy.kind)
            for node in needed(policy, self._layout, nodes, boundary):
                if not self._has(node, policy.kind) and not any(
                    each.start <= node.start and node.end <= each.stop for each in held
                ):
                    return False
        return True

    def _snapshots(
        self, commit: Commit, agent: Agent | None, raw: bytes, root: bytes, nodes: Sequence[Node], wanted: set[int]
    ) -> dict[int, Node]:
        """A node for each wanted boundary that has a snapshot, from before or from this request."""
        if not self._layout.has_state:
            return {}
        parents = {0: root} | {node.end: node.id for node in nodes if node.full}
        taken = set(commit.growth.snapshots) if commit.growth is not None else set()
        if commit.lease.snapshot is not None:
            taken.add(commit.reuse.length)
        found: dict[int, Node] = {}
        for boundary in sorted(wanted):
            begin = block_of(boundary)
            tokens = raw[begin * TOKEN_BYTES : boundary * TOKEN_BYTES]
            node = self._node(commit, parents[begin], boundary, tokens)
            before = agent.snapshots.get(boundary) if agent is not None else None
            if boundary in taken or (before is node and all(kind in node.parts for kind in self._layout.snapshots)):
                found[boundary] = node
        return found

    def _node(self, commit: Commit, parent: bytes, start: int, block_tokens: bytes) -> Node:
        extra_key = commit.lease.extra_key
        ident = node_id(parent, start, block_tokens, extra_key)
        node = self._index.nodes.get(ident)
        if node is None:
            return Node(ident, 0, commit.tenant, self._fingerprint, parent, start, block_tokens, extra_key=extra_key)
        assert (node.block_tokens, node.extra_key) == (block_tokens, extra_key), "two contexts with one id"
        return node


def _held(commit: Commit, kind: PartKind) -> list[range]:
    """The tokens whose entries of a kind a request holds: what was loaded with it, and all that it computed."""
    held: list[range] = []
    for span in commit.reuse.spans:
        if span.count and kind in span.parts:
            end = min(span.end, commit.reuse.length)
            if held and held[-1].stop == span.start:
                held[-1] = range(held[-1].start, end)
            else:
                held.append(range(span.start, end))
    if held and held[-1].stop == commit.reuse.length:
        held[-1] = range(held[-1].start, len(commit.tokens))
    else:
        held.append(range(commit.reuse.length, len(commit.tokens)))
    return held
