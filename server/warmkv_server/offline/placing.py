"""Whether the nodes of an archive make the context that they say, and what they are called in another tenant.

Node ids are hashes that begin with the tenant, so that tenants share nothing. An agent that moves to another tenant has
the same tokens and the same words under other ids.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator

import numpy as np

from warmkv_server.contract.kv import BLOCK_TOKENS, STRIDES, policy_of
from warmkv_server.kv.blocks.names import ID_BYTES, TOKEN_BYTES, block_of, node_id, root_id
from warmkv_server.kv.catalog import plausible
from warmkv_server.kv.index.index import Node
from warmkv_server.kv.index.prefix import MAX_KEPT
from warmkv_server.offline.archive import ArchiveManifest, BadArchive


def check(manifest: ArchiveManifest) -> None:
    """
    Raises:
        BadArchive: the nodes are not a context of this tenant and fingerprint, or their ids are not theirs.
    """
    length = _check_chain(manifest.nodes)
    _check_snapshots(manifest, length)
    boundaries = (*manifest.agent.kept, manifest.agent.previous)
    if not all(0 <= boundary <= length for boundary in boundaries):
        raise BadArchive("its boundaries are not of this context")
    for node, kind, _ in manifest.files():
        if policy_of(kind).snapshot != node.snapshot:
            raise BadArchive(f"its node {node.id.hex()} can't have a file of kind {kind}")
    if len({node.extra_key for node in _all(manifest)}) > 1:
        raise BadArchive("its nodes have different extra keys")
    raw = b"".join(node.own_tokens for node in manifest.nodes)
    if (wrong := plausible.token_violation(np.frombuffer(raw, "<i4"), None)) is not None:
        raise BadArchive(wrong)
    root = manifest.root or root_id(manifest.agent.tenant, manifest.fingerprint.digest)
    for node, (parent, ident) in zip(_all(manifest), _names(manifest, root), strict=True):
        if (node.parent, node.id) != (parent, ident):
            raise BadArchive(f"its node {node.id.hex()} is not of these tokens, this tenant and this fingerprint")


def _check_chain(nodes: Iterable[Node]) -> int:
    """That each continues the context where the one before ends; returns its length."""
    end, block = 0, b""
    for node in nodes:
        if node.start != end or node.count < 1 or node.end > node.block_start + BLOCK_TOKENS:
            raise BadArchive(f"its node {node.id.hex()} doesn't continue the context at token {end}")
        if not node.block_tokens.startswith(block):
            raise BadArchive(f"its node {node.id.hex()} has other tokens before it than the context")
        end, block = node.end, b"" if node.full else node.block_tokens
    return end


def _check_snapshots(manifest: ArchiveManifest, length: int) -> None:
    raw = b"".join(node.own_tokens for node in manifest.nodes)
    lengths = [snapshot.start for snapshot in manifest.snapshots]
    most = MAX_KEPT + 2 + 2 * len(STRIDES)
    if len(lengths) > most:
        raise BadArchive(f"it has {len(lengths)} snapshots, and {most} are the most")
    for snapshot in manifest.snapshots:
        first, last = block_of(snapshot.start) * TOKEN_BYTES, snapshot.start * TOKEN_BYTES
        twice = lengths.count(snapshot.start) > 1
        if twice or snapshot.count or not 0 < snapshot.end <= length or snapshot.block_tokens != raw[first:last]:
            raise BadArchive(f"its snapshot {snapshot.id.hex()} is not of this context")


def root_for(manifest: ArchiveManifest, tenant: str, fingerprint: str, *, trusted: bool, signed: bool) -> bytes:
    """What the context hangs from, which is who may use its KV.

    KV that nobody vouches for gets a root that no other context has: its ids are those of its tokens below a number
    that was never used, so nobody who asks for the same tokens finds them. Forks have the same nodes. What was exported
    with such a root keeps it in its own directory.

    Args:
        fingerprint: digest by which the directory knows the model.
        trusted: the operator vouches for the KV.
        signed: it came from this very directory.
    """
    if trusted or (signed and manifest.root is None):
        return root_id(tenant, fingerprint)
    if (
        signed
        and manifest.root is not None
        and (tenant, fingerprint) == (manifest.agent.tenant, manifest.fingerprint.digest)
    ):
        return manifest.root
    return secrets.token_bytes(ID_BYTES)


def placed(manifest: ArchiveManifest, tenant: str, fingerprint: str, root: bytes) -> tuple[list[Node], dict[int, Node]]:
    """The nodes and the snapshots by length, as the tenant would have them below this root; without files."""
    made = [
        Node(ident, 0, tenant, fingerprint, parent, n.start, n.block_tokens, lost=n.lost, extra_key=n.extra_key)
        for n, (parent, ident) in zip(_all(manifest), _names(manifest, root), strict=True)
    ]
    count = len(manifest.nodes)
    return made[:count], {node.start: node for node in made[count:]}


def _all(manifest: ArchiveManifest) -> Iterable[Node]:
    return (*manifest.nodes, *manifest.snapshots)


def _names(manifest: ArchiveManifest, root: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Parent and id of each node.

    Raises:
        BadArchive: the block before a node is not there as a whole.
    """
    parents = {0: root}
    for node in _all(manifest):
        parent = parents.get(node.block_start)
        if parent is None:
            raise BadArchive(f"its node {node.id.hex()} follows a block that isn't whole")
        ident = node_id(parent, node.start, node.block_tokens, node.extra_key)
        if node.full:
            parents[node.end] = ident
        yield parent, ident
