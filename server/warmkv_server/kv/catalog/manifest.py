"""The manifest of an agent: a small file with what the index knows of it, so that a lost index can be built anew.

Its tokens are not in it where a block file has them: it names the nodes, and their headers have the tokens. Node ids
are hashes of all tokens before, so whoever puts a context together from a manifest and headers can prove it right.
docs/format.md describes the file for other programs.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Self

from warmkv_server.contract.kv import BLOCK_TOKENS
from warmkv_server.kv.blocks.names import TOKEN_BYTES, root_id
from warmkv_server.kv.catalog import plausible
from warmkv_server.kv.catalog.sealed import Damaged, seal, unseal
from warmkv_server.kv.index.index import Agent

FORMAT = "warmkv-agent"
VERSION = 2
_READABLE = (1, 2)
FOLDER = "agents"
SUFFIX = ".json"


class BadManifest(Exception):
    """A manifest that can't be used, and why."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One agent as of a commit.

    Attributes:
        fingerprint: digest.
        blocks: ids of the full blocks in order, in hex; number n begins at token 256 n.
        segments: id and end (tokens from the context's start) of each segment behind them; each begins where the one
            before it ends.
        tokens: of the nodes that have no file, by id: little-endian int32, the node's own tokens only.
        snapshots: lengths of the context at which it has recurrent state.
        kept, previous: boundaries, as in `Agent`.
        ttl: seconds after the last use; None for ever.
        create_time, update_time, last_used: seconds since 1970.
        root: parent of the first node, in hex, where it isn't the tenant's own: the context, or its beginning, was
            imported from an archive that nobody vouched for.
        number: the index had it so at this transaction; 0 where nobody counted them.
        extra_key: what its KV is a function of besides the tokens, in hex.
    """

    tenant: str
    agent_id: str
    revision: int
    fingerprint: str
    blocks: tuple[str, ...]
    segments: tuple[tuple[str, int], ...]
    snapshots: tuple[int, ...]
    kept: tuple[int, ...]
    previous: int
    pinned: bool
    ttl: float | None
    labels: Mapping[str, str]
    create_time: float
    update_time: float
    last_used: float
    parent_agent_id: str
    ending: str
    tokens: Mapping[str, bytes] = field(default_factory=dict)
    root: str = ""
    number: int = 0
    extra_key: str = ""

    @classmethod
    def of(cls, agent: Agent, number: int = 0) -> Self:
        full = len(agent.nodes)
        while full and not agent.nodes[full - 1].full:
            full -= 1
        return cls(
            tenant=agent.tenant,
            agent_id=agent.agent_id,
            revision=agent.revision,
            fingerprint=agent.fingerprint,
            blocks=tuple([node.id.hex() for node in agent.nodes[:full]]),
            segments=tuple((node.id.hex(), node.end) for node in agent.nodes[full:]),
            snapshots=tuple(sorted(agent.snapshots)),
            kept=tuple(agent.kept),
            previous=agent.previous,
            pinned=agent.pinned,
            ttl=agent.ttl,
            labels=dict(agent.labels),
            create_time=agent.create_time,
            update_time=agent.update_time,
            last_used=agent.last_used,
            parent_agent_id=agent.parent_agent_id,
            ending=agent.ending,
            tokens={node.id.hex(): node.own_tokens for node in agent.nodes if not node.parts},
            root=_foreign_root(agent),
            number=number,
            extra_key=agent.extra_key.hex(),
        )

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """(id, start, end) of each node, in order."""
        found = [(node, at * BLOCK_TOKENS, (at + 1) * BLOCK_TOKENS) for at, node in enumerate(self.blocks)]
        for node, end in self.segments:
            found.append((node, found[-1][2] if found else 0, end))
        return found

    def says_the_same(self, other: Manifest) -> bool:
        """Whether they differ at most in the number, and in the time of the last use, which not each one has."""
        return replace(self, last_used=0.0, number=0) == replace(other, last_used=0.0, number=0)


def _foreign_root(agent: Agent) -> str:
    """The hex of its first node's parent, if that isn't the tenant's root."""
    if not agent.nodes or agent.nodes[0].parent == root_id(agent.tenant, agent.fingerprint):
        return ""
    return agent.nodes[0].parent.hex()


def file_name(tenant: str, agent_id: str) -> str:
    """Every agent has one name, and no name tells the agent's."""
    hasher = blake2b(digest_size=16, person=b"warmkv-agent")
    for text in (tenant.encode(), agent_id.encode()):
        hasher.update(len(text).to_bytes(8, "little") + text)
    return hasher.hexdigest() + SUFFIX


def encode(manifest: Manifest) -> bytes:
    """The file's content, the checksum filled in."""
    described: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    for name in Manifest.__dataclass_fields__:
        described[name] = getattr(manifest, name)
    described["tokens"] = {node: base64.b64encode(tokens).decode() for node, tokens in manifest.tokens.items()}
    return seal(described)


def decode(content: bytes) -> Manifest:
    """
    Raises:
        BadManifest: damaged, of another version, or not a manifest.
    """
    try:
        described = unseal(content)
        form, version = described.pop("format"), described.pop("version")
        if form != FORMAT or version not in _READABLE:
            raise BadManifest(f"format {form} {version}, not {FORMAT} {VERSION}")
        for name in ("blocks", "snapshots", "kept"):
            described[name] = tuple(described[name])
        described["segments"] = tuple((node, end) for node, end in described["segments"])
        described["tokens"] = {
            node: base64.b64decode(tokens, validate=True) for node, tokens in described["tokens"].items()
        }
        manifest = Manifest(**described)
        if (wrong := _violation(manifest)) is not None:
            raise BadManifest(wrong)
        return manifest
    except Damaged as error:
        raise BadManifest(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError) as error:
        raise BadManifest(f"unreadable: {error!r}") from error


def _violation(manifest: Manifest) -> str | None:
    """What of it can't be, whatever its checksum says."""
    spans = manifest.spans
    wrong = plausible.span_violation(spans, BLOCK_TOKENS)
    if wrong is not None:
        return wrong
    length = spans[-1][2] if spans else 0
    if manifest.root and not plausible.NODE_ID.fullmatch(manifest.root):
        return "its root is no id"
    if not all(type(at) is int and 0 < at <= length for at in manifest.snapshots):
        return "its snapshots are not of this context"
    if type(manifest.number) is not int or not 0 <= manifest.number < 1 << 63:
        return "its number can't be one"
    if not plausible.is_extra_key(manifest.extra_key):
        return "its extra key is none"
    if any(len(tokens) % TOKEN_BYTES for tokens in manifest.tokens.values()):
        return "its tokens are no tokens"
    return plausible.violation(manifest, length)
