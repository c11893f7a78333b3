"""Names of nodes: which context the KV belongs to.

An id is a hash of everything the KV is a function of: tenant and fingerprint (through the root), all tokens before
(through the parent's id), the node's own, and an extra key where tokens don't say all. It names the context, not the
bytes: two computations of one context may differ in rounding, and the first one committed is the one that is kept.
"""

from __future__ import annotations

from hashlib import blake2b

from warmkv_server.contract.kv import BLOCK_TOKENS

ID_BYTES = 16
TOKEN_BYTES = 4
"""A token id is stored as a little-endian int32."""


def root_id(tenant: str, fingerprint: str) -> bytes:
    """The parent of a tenant's first blocks. Different tenants and fingerprints share nothing below it."""
    hasher = blake2b(digest_size=ID_BYTES, person=b"warmkv-root")
    for text in (tenant.encode(), fingerprint.encode()):
        hasher.update(len(text).to_bytes(8, "little") + text)
    return hasher.digest()


def node_id(parent: bytes, start: int, block_tokens: bytes, extra_key: bytes = b"") -> bytes:
    """
    Args:
        parent: id of the full block before, or the root's.
        start: first token of the node, counted from the context's start. Equal to the node's end for a snapshot.
        block_tokens: int32 token ids from the start of the block that `start` lies in to the node's end.
        extra_key: what else the KV is a function of, such as a digest of an image or the name of an adapter.
    """
    hasher = blake2b(digest_size=ID_BYTES, person=b"warmkv-extra" if extra_key else b"warmkv-node")
    if extra_key:
        hasher.update(len(extra_key).to_bytes(8, "little") + extra_key)
    hasher.update(parent + start.to_bytes(8, "little") + block_tokens)
    return hasher.digest()


def block_of(position: int) -> int:
    """The first token of the block that a token lies in."""
    return position - position % BLOCK_TOKENS
