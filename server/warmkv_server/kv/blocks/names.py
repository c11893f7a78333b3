"""Names of nodes, which say to which context the KV belongs, and of the objects that have it.

An id is a hash of everything the KV is a function of: tenant and fingerprint (through the root), all tokens before
(through the parent's id), the node's own, and an extra key where tokens don't say all. It names the context, not the
bytes: two computations of one context may differ in rounding, and the first one committed is the one that is kept.

An object is what a node keeps of one kind. Its name says which, and of which bytes, so two versions of one node's KV
never have one name, wherever they were computed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b

from warmkv_server.contract.kv import BLOCK_TOKENS, PartKind, all_kinds

ID_BYTES = 16
EXTRA_KEY_BYTES = 512
"""Of an extra key at most."""
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


SUFFIX = ".safetensors"
_NAME = re.compile(r"([0-9a-f]{32})\.([a-z0-9]+)\.([0-9a-f]{32})" + re.escape(SUFFIX))


@dataclass(frozen=True, slots=True)
class Name:
    """What an object's name says. `node` and `digest` in hex."""

    node: str
    kind: PartKind
    digest: str

    @classmethod
    def parse(cls, text: str) -> Name | None:
        """None if it isn't one, or of a kind that nobody knows."""
        found = _NAME.fullmatch(text)
        return cls(found[1], PartKind(found[2]), found[3]) if found is not None and found[2] in all_kinds() else None

    def __str__(self) -> str:
        return object_name(self.node, self.kind, self.digest)


def object_name(node: str, kind: PartKind, digest: str) -> str:
    """
    Args:
        node: its id in hex.
        digest: of the bytes, as in `blockfile.Part`.
    """
    return f"{node}.{kind}.{digest}{SUFFIX}"
