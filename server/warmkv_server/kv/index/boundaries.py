"""At which lengths a kept context can be taken up again.

With append-only layers alone, at any. Windowed layers need the entries of the last `window` tokens there, recurrent
ones a snapshot captured exactly there; both are kept at few lengths, because they are only of use at those. What a
boundary needs of a kind, the kind's policy says.

Windows are kept in whole blocks: what lies in the block of a boundary is complete, so merging its segments never lacks
an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from warmkv_server.contract.kv import BLOCK_TOKENS, KindPolicy, KVLayout, PartKind, Ranges
from warmkv_server.kv.blocks.ids import block_of
from warmkv_server.kv.index.index import Index, Node, PartOf

MAX_KEPT = 4
"""Boundaries an agent keeps besides its head and the one before: the latest asked for. More would cost disk without
bound."""

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


def needed(policy: KindPolicy, layout: KVLayout, nodes: Iterable[Node], boundary: int) -> list[Node]:
    """The nodes whose parts of a kind this boundary needs."""
    ranges = kept_for(policy, layout, boundary)
    return [node for node in nodes if overlaps(ranges, node)]


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
