"""At which lengths a kept context can be taken up again.

With append-only layers alone, at any. Windowed layers need the words of the last `window` tokens there, recurrent ones
a snapshot taken exactly there; both are kept at few lengths, because they are only of use at those.

Windows are kept in whole blocks: what lies in the block of a boundary is complete, so merging its segments never lacks
a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from warmkv_server.contract.kv import KVLayout, PartKind
from warmkv_server.kv.blocks.ids import block_of
from warmkv_server.kv.index.index import Index, Node

MAX_KEPT = 4
"""Boundaries an agent keeps besides its head and the one before: the latest asked for. More would cost disk without
bound."""

Has = Callable[[Node, PartKind], bool]
"""Whether a node's part can be had, from RAM or disk."""


@dataclass(frozen=True)
class Prefix:
    """A usable prefix: `nodes` cover it, the last may reach beyond."""

    length: int = 0
    nodes: tuple[Node, ...] = ()
    snapshot: Node | None = None


def window_start(boundary: int, window: int) -> int:
    """First token whose WINDOW words are kept for this boundary."""
    return block_of(max(boundary - window, 0))


def in_window(nodes: Iterable[Node], boundary: int, window: int) -> list[Node]:
    """The nodes whose WINDOW parts this boundary needs."""
    if not window:
        return []
    start = window_start(boundary, window)
    return [node for node in nodes if node.end > start and node.start < boundary]


def longest_usable(index: Index, layout: KVLayout, nodes: Sequence[Node], reach: int, root: bytes, has: Has) -> Prefix:
    """The longest prefix, of at most `reach` tokens, of the context of `nodes` that can be taken up.

    Args:
        nodes: contiguous from token 0, with their APPEND parts at hand; `reach` lies in or at the end of the last.
        root: what the first node's parent would be, if there is none.
    """
    root = nodes[0].parent if nodes else root  # Not the tenant's own where the context was imported.
    if layout.has_state:
        return _longest_with_state(index, layout, nodes, reach, root, has)
    length = _end_of_window(layout, nodes, reach, has)
    return Prefix(length, _covering(nodes, length))


def _end_of_window(layout: KVLayout, nodes: Sequence[Node], reach: int, has: Has) -> int:
    """The last length <= reach whose window is at hand.

    If the end of a stretch of nodes with windows has its own window in the stretch, it is the best of the stretch. If
    not, no length of the stretch has: windows of earlier lengths begin earlier.
    """
    if not layout.window:
        return reach
    end: int | None = None
    for node in reversed(nodes):
        if end is None:
            end = min(node.end, reach)
        if not has(node, PartKind.WINDOW):
            end = None
        elif node.start <= window_start(end, layout.window):
            return end
    return 0


def _longest_with_state(
    index: Index, layout: KVLayout, nodes: Sequence[Node], reach: int, root: bytes, has: Has
) -> Prefix:
    # Snapshots hang below the full block before them; go through these from the last to the root.
    last_in_block = {node.block_start: node for node in nodes}
    parents = [(0, root), *((node.end, node.id) for node in nodes if node.full)]
    for begin, parent in reversed(parents):
        inside = last_in_block.get(begin)
        tokens = inside.block_tokens if inside is not None else b""
        found = [
            snapshot
            for snapshot in index.snapshots_after(parent)
            if snapshot.end <= reach and tokens.startswith(snapshot.block_tokens) and has(snapshot, PartKind.STATE)
        ]
        for snapshot in sorted(found, key=lambda s: -s.end):
            covering = _covering(nodes, snapshot.end)
            if all(has(node, PartKind.WINDOW) for node in in_window(covering, snapshot.end, layout.window)):
                return Prefix(snapshot.end, covering, snapshot)
    return Prefix()


def _covering(nodes: Sequence[Node], length: int) -> tuple[Node, ...]:
    return tuple(node for node in nodes if node.start < length)
