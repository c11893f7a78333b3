"""One agent as one file: a tar of its block files as they are, behind a manifest that says what they make.

FORMAT.md describes it for other programs. An archive is written and read from front to back, a block at a time.
"""

from __future__ import annotations

import base64
import binascii
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Self

from warmkv_server.kv.blockfile import BadFile, Parsed, file_name, verify
from warmkv_server.kv.index import Agent, Node, Part
from warmkv_server.kv.records import Fingerprint
from warmkv_server.kv.sealed import Damaged, seal, unseal
from warmkv_server.kv.types import Fallback, PartKind

FORMAT = "warmkv-agent-archive"
VERSION = 1
MANIFEST = "manifest.json"
_FOLDER = "blocks/"
_MANIFEST_LIMIT = 1 << 30


class BadArchive(Exception):
    """What is wrong with a file, as the end of a sentence about it."""


@dataclass(frozen=True)
class Manifest:
    """The agent, and the nodes of its context.

    Attributes:
        agent: without tokens and nodes.
        nodes: in order, then the snapshots. `parts` are the files that follow; `lost` says why one is not there.
    """

    fingerprint: Fingerprint
    agent: Agent
    nodes: tuple[Node, ...]
    snapshots: tuple[Node, ...]

    @classmethod
    def of(cls, agent: Agent, fingerprint: Fingerprint) -> Self:
        return cls(fingerprint, agent, tuple(agent.nodes), tuple(agent.snapshots.values()))

    def files(self) -> Iterator[tuple[Node, PartKind, Part]]:
        """In the order in which they follow the manifest."""
        for node in (*self.nodes, *self.snapshots):
            for kind in PartKind:
                if kind in node.parts:
                    yield node, kind, node.parts[kind]

    def encode(self) -> bytes:
        agent = self.agent
        described = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": dict(self.fingerprint.fields),
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
            "nodes": [_describe(node) for node in self.nodes],
            "snapshots": [_describe(node) for node in self.snapshots],
        }
        return seal(described)

    @classmethod
    def decode(cls, content: bytes) -> Self:
        """
        Raises:
            BadArchive
        """
        try:
            told = unseal(content)
            if told["format"] != FORMAT or told["version"] != VERSION:
                raise BadArchive(f"it is of format {told['format']} {told['version']}, not {FORMAT} {VERSION}")
            fingerprint = Fingerprint({str(name): str(value) for name, value in told["fingerprint"].items()})
            agent = Agent(told["tenant"], told["agent_id"], 0, fingerprint.digest)
            agent.revision, agent.previous = int(told["revision"]), int(told["previous"])
            agent.kept, agent.pinned = tuple(map(int, told["kept"])), bool(told["pinned"])
            agent.ttl = None if told["ttl"] is None else float(told["ttl"])
            agent.labels = {str(name): str(value) for name, value in told["labels"].items()}
            agent.create_time, agent.update_time = float(told["create_time"]), float(told["update_time"])
            agent.parent_agent_id, agent.ending = str(told["parent_agent_id"]), str(told["ending"])
            nodes = tuple(_read_node(told["tenant"], fingerprint.digest, node) for node in told["nodes"])
            snapshots = tuple(_read_node(told["tenant"], fingerprint.digest, node) for node in told["snapshots"])
        except Damaged as error:
            raise BadArchive(f"its manifest is {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError) as error:
            raise BadArchive(f"its manifest is unreadable: {error!r}") from error
        return cls(fingerprint, agent, nodes, snapshots)


class ArchiveWriter:
    """Appends members to a file that is open for writing. Without `finish`, the file is cut off."""

    def __init__(self, file: IO[bytes], manifest: Manifest) -> None:
        self._file = file
        self._add(MANIFEST, manifest.encode())

    def add(self, node: Node, kind: PartKind, content: bytes) -> None:
        self._add(member_name(node, kind), content)

    def finish(self) -> None:
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))

    def _add(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o600
        for piece in (info.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)):
            self._file.write(piece)


class ArchiveReader:
    """Reads members in order. Nothing is taken from a member's name but whether it is the expected one."""

    def __init__(self, file: IO[bytes]) -> None:
        """
        Raises:
            BadArchive
        """
        try:
            self._tar = tarfile.open(fileobj=file, mode="r|")  # noqa: SIM115 - the file is the caller's
        except tarfile.TarError as error:
            raise BadArchive("it is not an archive of an agent") from error
        self.manifest = Manifest.decode(self._read(MANIFEST, None))

    def files(self) -> Iterator[tuple[Node, PartKind, bytes, Parsed]]:
        """Every block file, whole and the one that the manifest announces.

        Raises:
            BadArchive
        """
        for node, kind, part in self.manifest.files():
            content = self._read(member_name(node, kind), part.nbytes)
            try:
                parsed = verify(content)
                if parsed.digest != part.digest:
                    raise BadFile(Fallback.CHECKSUM, "its checksum is not the manifest's")
            except BadFile as bad:
                raise BadArchive(f"its block {node.id.hex()} ({kind}) is damaged: {bad}") from bad
            yield node, kind, content, parsed

    def _read(self, name: str, size: int | None) -> bytes:
        try:
            member = self._tar.next()
            if member is None:
                raise BadArchive(f"it is cut off before {name}")
            if member.name != name or not member.isfile() or member.size > _MANIFEST_LIMIT:
                raise BadArchive(f"it has {member.name!r} where {name} belongs")
            if size is not None and member.size != size:
                raise BadArchive(f"{name} has {member.size} bytes instead of {size}")
            file = self._tar.extractfile(member)
            content = file.read() if file is not None else b""
        except (tarfile.TarError, EOFError) as error:
            raise BadArchive(f"it is cut off or damaged at {name}") from error
        if len(content) != member.size:
            raise BadArchive(f"it is cut off in {name}")
        return content


def member_name(node: Node, kind: PartKind) -> str:
    return _FOLDER + file_name(node.id.hex(), kind)


def _describe(node: Node) -> Mapping[str, Any]:
    return {
        "node": node.id.hex(),
        "parent": node.parent.hex(),
        "start": node.start,
        "tokens": base64.b64encode(node.block_tokens).decode(),
        "parts": {kind.value: [part.nbytes, part.digest] for kind, part in node.parts.items()},
        "lost": node.lost,
    }


def _read_node(tenant: str, fingerprint: str, told: Mapping[str, Any]) -> Node:
    tokens = base64.b64decode(told["tokens"], validate=True)
    ident, parent = bytes.fromhex(told["node"]), bytes.fromhex(told["parent"])
    node = Node(ident, 0, tenant, fingerprint, parent, int(told["start"]), tokens)
    node.parts = {PartKind(kind): Part(int(size), str(digest)) for kind, (size, digest) in told["parts"].items()}
    node.lost = Fallback(told["lost"]) if told["lost"] else None
    return node
