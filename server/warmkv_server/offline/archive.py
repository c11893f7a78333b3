"""One agent as one file: a tar of its block files as they are, behind a manifest that says what they make.

docs/format.md describes it for other programs. An archive is written and read from front to back, a block at a time.
Its checksums say that it is as it was written, not by whom. So the manifest is signed with the exporting directory's
key, and has digests of the files that nobody can find other content for; an archive with the right signature is
believed.

What reads it takes nothing on trust: sizes are bounded before anything is read, and every value is one that the API
would have taken.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Self

from warmkv_server.contract.kv import BLOCK_TOKENS, Fallback, PartKind, all_kinds, known_kind
from warmkv_server.kv.blocks.blockfile import BadFile, Parsed, Part, verify
from warmkv_server.kv.blocks.names import ID_BYTES, SUFFIX, TOKEN_BYTES, root_id
from warmkv_server.kv.catalog import plausible
from warmkv_server.kv.catalog.sealed import Damaged, seal, unseal
from warmkv_server.kv.catalog.signing import is_signed, sign
from warmkv_server.kv.index.index import Agent, Node
from warmkv_server.kv.index.records import Fingerprint

FORMAT = "warmkv-agent-archive"
VERSION = 2
_READABLE = (1, 2)
"""1 has neither extra keys nor the digest that its ids hang from, and names files without their checksums."""
MANIFEST = "manifest.json"
_FOLDER = "blocks/"
_MANIFEST_LIMIT = 32 << 20
"""Bytes; a context of a million tokens has 8 MiB."""
_FILE_LIMIT = 4 << 30
_NODE_LIMIT = 1 << 16
_FIELD_LIMIT = 64
_SIGNATURE = "hmac_sha256"


class BadArchive(Exception):
    """What is wrong with a file, as the end of a sentence about it."""


@dataclass(frozen=True)
class ArchiveManifest:
    """The agent, and the nodes of its context.

    Attributes:
        agent: without tokens and nodes.
        nodes: in order, then the snapshots. `parts` are the files that follow; `lost` says why one is not there.
        root: the first node's parent, where it isn't the tenant's root.
        digests: SHA-256 of the files, in hex, by node id and kind; of all of them, or of none.
        signature: over everything else, by whoever had the key.
        signed: what the signature is over.
        version: of the archive's format.
    """

    fingerprint: Fingerprint
    agent: Agent
    nodes: tuple[Node, ...]
    snapshots: tuple[Node, ...]
    root: bytes | None = None
    digests: Mapping[tuple[bytes, PartKind], str] = field(default_factory=dict)
    signature: object = None
    signed: bytes = b""
    version: int = VERSION

    @classmethod
    def of(
        cls, agent: Agent, fingerprint: Fingerprint, digests: Mapping[tuple[bytes, PartKind], str] | None = None
    ) -> Self:
        own = not agent.nodes or agent.nodes[0].parent == root_id(agent.tenant, agent.fingerprint)
        root = None if own else agent.nodes[0].parent
        return cls(fingerprint, agent, tuple(agent.nodes), tuple(agent.snapshots.values()), root, digests or {})

    def is_signed_with(self, key: bytes | None) -> bool:
        """Whether it came from the data directory that has the key, with the files that follow."""
        files = {(node.id, kind) for node, kind, _ in self.files()}
        return self.digests.keys() == files and is_signed(key, self.signed, self.signature)

    def files(self) -> Iterator[tuple[Node, PartKind, Part]]:
        """In the order in which they follow the manifest."""
        for node in (*self.nodes, *self.snapshots):
            for kind in all_kinds():
                if kind in node.parts:
                    yield node, kind, node.parts[kind]

    def encode(self, key: bytes | None = None) -> bytes:
        """
        Args:
            key: to sign it with.
        """
        agent = self.agent
        described: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": dict(self.fingerprint.fields),
            "fingerprint_digest": self.fingerprint.digest,
            "tenant": agent.tenant,
            "agent_id": agent.agent_id,
            "revision": agent.revision,
            "kept": agent.kept,
            "previous": agent.previous,
            "pinned": agent.pinned,
            "ttl": agent.ttl,
            "labels": agent.labels,
            "create_time": agent.create_time,
            "update_time": agent.update_time,
            "parent_agent_id": agent.parent_agent_id,
            "ending": agent.ending,
            "root": "" if self.root is None else self.root.hex(),
            "nodes": [self._describe(node) for node in self.nodes],
            "snapshots": [self._describe(node) for node in self.snapshots],
        }
        if key is not None:
            described[_SIGNATURE] = sign(key, _as_signed(described))
        return seal(described)

    def _describe(self, node: Node) -> Mapping[str, Any]:
        return {
            "node": node.id.hex(),
            "parent": node.parent.hex(),
            "start": node.start,
            "tokens": base64.b64encode(node.block_tokens).decode(),
            "parts": {kind: [part.nbytes, part.digest] for kind, part in node.parts.items()},
            "sha256": {kind: self.digests[node.id, kind] for kind in node.parts if self.digests},
            "lost": node.lost,
            **({"extra_key": node.extra_key.hex()} if node.extra_key else {}),
        }

    @classmethod
    def decode(cls, content: bytes) -> Self:
        """
        Raises:
            BadArchive
        """
        try:
            told = unseal(content)
            signature = told.pop(_SIGNATURE, None)
            signed = _as_signed(told)
            if told["format"] != FORMAT or told["version"] not in _READABLE:
                raise BadArchive(f"it is of format {told['format']} {told['version']}, not {FORMAT} {VERSION}")
            fingerprint = _read_fingerprint(told["fingerprint"], told.get("fingerprint_digest", ""))
            agent = Agent(told["tenant"], told["agent_id"], 0, fingerprint.digest)
            agent.revision, agent.previous = told["revision"], told["previous"]
            agent.kept, agent.pinned, agent.ttl = tuple(told["kept"]), told["pinned"], told["ttl"]
            agent.labels, agent.ending = dict(told["labels"]), told["ending"]
            agent.create_time, agent.update_time = told["create_time"], told["update_time"]
            agent.parent_agent_id = told["parent_agent_id"]
            if len(told["nodes"]) + len(told["snapshots"]) > _NODE_LIMIT:
                raise BadArchive(f"it has more than {_NODE_LIMIT} nodes")
            nodes = tuple(_read_node(agent.tenant, fingerprint.digest, node) for node in told["nodes"])
            snapshots = tuple(_read_node(agent.tenant, fingerprint.digest, node) for node in told["snapshots"])
            wrong = plausible.violation(agent, nodes[-1].end if nodes else 0)
            if wrong is not None:
                raise BadArchive(f"its agent can't be one: {wrong}")
            root = bytes.fromhex(told.get("root", "")) or None
            if root is not None and len(root) != ID_BYTES:
                raise BadArchive("its root is no id")
            digests = {
                (bytes.fromhex(node["node"]), known_kind(kind)): str(digest)
                for node in (*told["nodes"], *told["snapshots"])
                for kind, digest in node.get("sha256", {}).items()
            }
        except Damaged as error:
            raise BadArchive(f"its manifest is {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError) as error:
            raise BadArchive(f"its manifest is unreadable: {error!r}") from error
        return cls(fingerprint, agent, nodes, snapshots, root, digests, signature, signed, told["version"])


class ArchiveWriter:
    """Appends members to a file that is open for writing. Without `finish`, the file is cut off."""

    def __init__(self, file: IO[bytes], manifest: ArchiveManifest, key: bytes | None) -> None:
        self._file = file
        self._add(MANIFEST, manifest.encode(key))

    def add(self, node: Node, kind: PartKind, content: bytes) -> None:
        self._add(_member_name(node, kind, node.parts[kind], VERSION), content)

    def finish(self) -> None:
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))

    def _add(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o600
        for piece in (info.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)):
            self._file.write(piece)


class ArchiveReader:
    """Reads members in order. Nothing is taken from a member's name but whether it is the expected one.

    Members are the plain files that the exporter writes. tarfile would follow extended headers, of any number and size,
    before it gives the next one.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        """
        Args:
            size: of the file.

        Raises:
            BadArchive
        """
        self._file = file
        self._left = size
        self.manifest = ArchiveManifest.decode(self._read(MANIFEST, None, _MANIFEST_LIMIT))

    def files(self) -> Iterator[tuple[Node, PartKind, bytes, Parsed]]:
        """Every block file, whole and the one that the manifest announces.

        Raises:
            BadArchive
        """
        for node, kind, part in self.manifest.files():
            name = _member_name(node, kind, part, self.manifest.version)
            content = self._read(name, part.nbytes, _FILE_LIMIT)
            digest = self.manifest.digests.get((node.id, kind))
            try:
                if digest is not None and hashlib.sha256(content).hexdigest() != digest:
                    raise BadFile(Fallback.CHECKSUM, "its SHA-256 is not the manifest's")
                parsed = verify(content)
                if parsed.digest != part.digest:
                    raise BadFile(Fallback.CHECKSUM, "its checksum is not the manifest's")
            except BadFile as bad:
                raise BadArchive(f"its block {node.id.hex()} ({kind}) is damaged: {bad}") from bad
            yield node, kind, content, parsed

    def _read(self, name: str, size: int | None, limit: int) -> bytes:
        member = self._header(name)
        if member.name != name or not member.isreg():
            raise BadArchive(f"it has {member.name[:100]!r} where {name} belongs")
        if size is not None and member.size != size:
            raise BadArchive(f"{name} has {member.size} bytes instead of {size}")
        if member.size > limit:
            raise BadArchive(f"{name} has {member.size} bytes, and {limit} are the most")
        padded = member.size + -member.size % tarfile.BLOCKSIZE
        if padded > self._left:
            raise BadArchive(f"it is cut off in {name}")
        content = self._take(padded)
        if len(content) != padded:
            raise BadArchive(f"it is cut off in {name}")
        return content[: member.size]

    def _header(self, name: str) -> tarfile.TarInfo:
        block = self._take(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or not any(block):
            raise BadArchive(f"it is cut off before {name}")
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise BadArchive(f"it is damaged, or no archive of an agent, where {name} belongs") from error

    def _take(self, nbytes: int) -> bytes:
        content = self._file.read(nbytes)
        self._left -= len(content)
        return content


def _member_name(node: Node, kind: PartKind, part: Part, version: int) -> str:
    return _FOLDER + (f"{node.id.hex()}.{kind}{SUFFIX}" if version == 1 else node.object_name(kind, part))


def _as_signed(described: Mapping[str, Any]) -> bytes:
    """The same bytes for the same entries, whether they are to be written or were read."""
    return json.dumps(described, separators=(",", ":")).encode()


def _read_fingerprint(told: Mapping[str, Any], digest: str) -> Fingerprint:
    if digest and not (plausible.is_text(digest) and plausible.NODE_ID.fullmatch(digest)):
        raise BadArchive("its fingerprint's digest is none")
    if len(told) > _FIELD_LIMIT or not all(plausible.is_text(text) for pair in told.items() for text in pair):
        raise BadArchive("its fingerprint is none")
    return Fingerprint(dict(told), digest)


def _read_node(tenant: str, fingerprint: str, told: Mapping[str, Any]) -> Node:
    tokens = base64.b64decode(told["tokens"], validate=True)
    if not all(
        plausible.is_text(told[each]) and plausible.NODE_ID.fullmatch(told[each]) for each in ("node", "parent")
    ):
        raise BadArchive("it has a node whose id is none")
    start = told["start"]
    if type(start) is not int or not 0 <= start < 1 << 31 or len(tokens) % TOKEN_BYTES:
        raise BadArchive(f"its node {told['node']} is of tokens that can't be")
    node = Node(bytes.fromhex(told["node"]), 0, tenant, fingerprint, bytes.fromhex(told["parent"]), start, tokens)
    if not plausible.is_extra_key(extra_key := told.get("extra_key", "")):
        raise BadArchive(f"its node {told['node']} has an extra key that can't be")
    node.extra_key = bytes.fromhex(extra_key)
    if not 0 <= node.count <= BLOCK_TOKENS:
        raise BadArchive(f"its node {told['node']} is of tokens that can't be")
    for kind, (size, digest) in told["parts"].items():
        if type(size) is not int or not 0 <= size <= _FILE_LIMIT:
            raise BadArchive(f"its node {told['node']} has a file of {size} bytes")
        node.parts[known_kind(kind)] = Part(size, str(digest))
    node.lost = Fallback(told["lost"]) if told["lost"] else None
    return node
