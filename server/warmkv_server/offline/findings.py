"""What `warmkv store verify` can find."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from warmkv_server.contract.kv import PartKind
from warmkv_server.kv.blocks.disk import BLOCKS
from warmkv_server.kv.blocks.files import in_words
from warmkv_server.kv.index.index import Node


class Trouble(StrEnum):
    DAMAGED = "damaged"
    """The file contradicts itself: a bad checksum, or a header that can't be."""
    UNREADABLE = "unreadable"
    """The system refuses to read it."""
    MISMATCH = "mismatch"
    """The file is whole, but not the one that the index has under this name."""
    MISSING = "missing"
    """The index has it, the directory has not."""
    UNKNOWN = "unknown"
    """A block file, or a manifest, that the index doesn't have."""
    INCOMPLETE = "incomplete"
    """An agent has lost files to one of the others, now or before: the tokens behind are computed anew."""
    NOT_REBUILDABLE = "not rebuildable"
    """A manifest is whole, but the tokens that it counts on are nowhere: a lost index would lose its agent too."""


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        subject: a path under the data directory, or an agent.
    """

    trouble: Trouble
    subject: str
    detail: str


@dataclass(frozen=True)
class Bad:
    """A file that must not be used."""

    path: Path
    trouble: Trouble
    detail: str
    node: Node | None = None
    kind: PartKind | None = None


@dataclass
class Report:
    """
    Attributes:
        notes: what may be so: leftovers of a crash, files in the making, blocks that the quota took.
    """

    files: int = 0
    nbytes: int = 0
    agents: int = 0
    manifests: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)


def short(path: Path) -> str:
    """From the data directory on."""
    parts = path.parts[-3:] if path.parts[-3] == BLOCKS else path.parts[-2:]
    return in_words(Path(*parts))


def name_of(tenant: str, agent_id: str) -> str:
    """Of an agent, for people."""
    return f"agent {agent_id!r}" + (f" of tenant {tenant!r}" if tenant else "")
