"""The latest commits once more, beside the index: what makes its loss, or that of its log, cost nothing.

SQLite drops the rest of its log behind a frame whose checksum fails, and says nothing: such an index looks whole, and
is older than what was acknowledged. So every transaction has a number, and each that changes an agent is written down
here as well, synced, before anybody is told: the agent's manifest as of the commit, or that it was deleted. A line
each, with a checksum of its own. When the agent's manifest is in its own file, its line isn't needed any more. An index
whose number is below the highest number here is not the last one.

The file is as long from the beginning as it will get, so that a line is one write and one sync, and a full disk still
takes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from warmkv_server.contract.names import AgentKey
from warmkv_server.kv.blocks.files import Files, read_file
from warmkv_server.kv.catalog.manifest import BadManifest, Manifest, decode, encode
from warmkv_server.kv.catalog.sealed import Damaged, seal, unseal
from warmkv_server.kv.index.index import Agent

log = logging.getLogger(__name__)

FILE_NAME = "commits.log"
FORMAT = "warmkv-commits"
DELETED = "warmkv-agent-deleted"
VERSION = 1
BYTES = 256 << 10
"""Length of the file, unless what it has to keep is longer."""
_READ_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Record:
    """What a transaction makes of an agent. `line` is how the log has it; None for a deletion."""

    key: AgentKey
    line: bytes | None


RecordOf = Callable[[int], Record]
"""Makes the record from the transaction's number."""


def lives(agent: Agent) -> RecordOf:
    """The agent as it is when the record is made."""
    return lambda number: Record(agent.key, encode(Manifest.of(agent, number)))


def dies(agent: Agent) -> RecordOf:
    return lambda _: Record(agent.key, None)


class CommitLog:
    """Blocking; used by the journal's thread. It never refuses a commit that the index has taken: what a broken disk
    doesn't let it write down is a warning, and its file goes, rather than tell less than it promises."""

    def __init__(self, data_dir: Path, files: Files, limit: int = BYTES) -> None:
        self._path = data_dir / FILE_NAME
        self._files = files
        self._limit = min(limit, BYTES)
        self._needed: dict[AgentKey, tuple[int, bytes]] = {}
        self._fd: int | None = None
        self._number = self._end = 0
        self._refused = False
        self.nbytes = 0
        """Of the file."""
        self.bytes_written = 0

    def begin(self, number: int, needed: Mapping[AgentKey, tuple[int, bytes]] | None = None) -> None:
        """A new file, as of a transaction.

        Args:
            needed: number and line of agents whose manifest is not in its file.
        """
        self._number, self._needed = number, dict(needed or {})
        self._or_give_up(self._rewrite)

    def append(self, number: int, record: Record) -> None:
        """Have it on the medium."""
        self._number = number
        if record.line is None:
            self._needed.pop(record.key, None)
            tenant, agent_id = record.key
            line = seal(
                {"format": DELETED, "version": VERSION, "number": number, "tenant": tenant, "agent_id": agent_id}
            )
        else:
            self._needed[record.key] = number, record.line
            line = record.line
        self._or_give_up(lambda: self._add(line + b"\n"))

    def cover(self, written: Mapping[AgentKey, int]) -> None:
        """These agents' manifests are in their files, as of these transactions."""
        for key, number in written.items():
            needed = self._needed.get(key)
            if needed is not None and needed[0] <= number:
                del self._needed[key]

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _add(self, line: bytes) -> None:
        if self._fd is None or self._end + len(line) > self.nbytes:
            self._rewrite()
            return
        if os.pwrite(self._fd, line, self._end) != len(line):
            raise OSError("only a part of a line was written")
        self._files.sync_data(self._fd)
        self._end += len(line)
        self.bytes_written += len(line)

    def _rewrite(self) -> None:
        """With what is needed alone. A deletion needs no line in a file that knows nothing older."""
        self.close()
        head = seal({"format": FORMAT, "version": VERSION, "number": self._number})
        content = b"".join(line + b"\n" for line in (head, *(line for _, line in self._needed.values())))
        size = max(self._limit, 2 * len(content))
        self._files.write(self._path, [memoryview(content), memoryview(bytes(size - len(content)))])
        self._files.sync_folders([self._path.parent])
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        self._end, self.nbytes = len(content), size
        self.bytes_written += size
        self._refused = False

    def _or_give_up(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self.close()
            self.nbytes = 0
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
                self._files.sync_folders([self._path.parent])
            if not self._refused:
                log.warning("the disk refuses the log of commits beside the index, which goes on without: %s", error)
            self._refused = True


@dataclass
class Told:
    """What a log of commits tells.

    Attributes:
        number: of the last transaction that it knows.
        agents: the newest manifest of each agent in it, or the number of the transaction that deleted it.
        unreadable: lines with a wrong checksum.
    """

    number: int = 0
    agents: dict[AgentKey, Manifest | int] = field(default_factory=dict)
    unreadable: int = 0


def read(data_dir: Path) -> Told:
    """What is there; a line that a crash cut off was never acknowledged."""
    told = Told()
    try:
        content = read_file(data_dir / FILE_NAME, _READ_LIMIT)
    except OSError:
        return told
    *lines, _ = content.rstrip(b"\0").split(b"\n")
    for line in lines:
        try:
            _take(line, told)
        except (Damaged, BadManifest, ValueError, KeyError, TypeError, RecursionError):
            told.unreadable += 1
    return told


def _take(line: bytes, told: Told) -> None:
    described = unseal(line)
    number = described.get("number")
    if type(number) is not int:
        raise ValueError("a line without a number")
    if described["format"] == DELETED:
        told.agents[AgentKey(described["tenant"], described["agent_id"])] = number
    elif described["format"] != FORMAT:
        manifest = decode(line)
        told.agents[AgentKey(manifest.tenant, manifest.agent_id)] = manifest
    told.number = max(told.number, number)
