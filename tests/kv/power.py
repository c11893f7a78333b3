"""A disk that remembers what it would still have after a power cut, at every moment.

What was written is certain only once it was synced; a name (created, renamed or removed) only once its folder was
synced after. Everything else may have reached the medium or not, independently.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from warmkv_server.contract.store import Durability
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.catalog.database import INDEX_FILE, Database, Statement

Image = dict[Path, bytes]
"""Contents of files by path, as found after a power cut."""


@dataclass
class _File:
    volatile: bytes = b""
    durable: bytes | None = None


@dataclass
class Moment:
    """What a power cut just now could leave behind."""

    certain: dict[Path, _File]
    present: dict[Path, _File]
    contents: dict[int, bytes | None]
    index: Image
    next_index: Image | None = None
    allowed: object = None
    allowed_told: str = ""

    def image(self, how: str, rng: random.Random) -> Image:
        """One outcome: "nothing" that was not synced made it, "names" made it before contents, or "some" did."""
        image: Image = {}
        for path in self.certain.keys() | self.present.keys():
            sides = {"nothing": [self.certain], "names": [self.present], "some": [self.certain, self.present]}[how]
            file = rng.choice(sides).get(path)
            if file is not None:
                durable = self.contents[id(file)]
                image[path] = durable if durable is not None else file.volatile[: rng.randrange(len(file.volatile) + 1)]
        index = self.index
        if how == "some" and self.next_index is not None:
            index = _torn(self.index, self.next_index, rng)
        return {**image, **index}

    def key(self) -> object:
        """Equal for moments that leave the same behind."""
        return (
            tuple(sorted((str(p), id(f), self.contents[id(f)] is None) for p, f in self.certain.items())),
            tuple(sorted((str(p), id(f), self.contents[id(f)] is None) for p, f in self.present.items())),
            id(self.index),
            self.allowed_told,
        )


def _torn(before: Image, after: Image, rng: random.Random) -> Image:
    """The index in the middle of a transaction: its log grew by an arbitrary piece."""
    wal = next((p for p in after if p.name.endswith("-wal")), None)
    if wal is None or not after[wal].startswith(before.get(wal, b"")):
        return before
    old = len(before.get(wal, b""))
    return {**before, wal: after[wal][: rng.randint(old, len(after[wal]))]}


@dataclass
class PowerlessFiles(Files):
    """Real files, and a record of every moment that a power cut could come in."""

    data: Path
    moments: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(Durability.FULL)
        self.allowed: object = None
        self._allowed_told = ""
        self._lock = threading.Lock()
        self._files: list[_File] = []
        self._open: dict[int, _File] = {}
        self._present: dict[Path, _File] = {}
        self._certain: dict[Path, _File] = {}
        self._index: Image = {}

    def create(self, path: Path) -> int:
        fd = super().create(path)
        with self._lock:
            file = _File()
            self._files.append(file)
            self._open[fd] = self._present[path] = file
            self._note()
        return fd

    def fill(self, fd: int, buffers: Sequence[memoryview]) -> None:
        super().fill(fd, buffers)
        with self._lock:
            self._open[fd].volatile += b"".join(bytes(b) for b in buffers)
            self._note()

    def sync(self, fd: int) -> None:
        super().sync(fd)
        with self._lock:
            if fd in self._open:
                file = self._open.pop(fd)
                file.durable = file.volatile
                self._note()

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        with self._lock:
            self._present[target] = self._present.pop(source)
            self._note()

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        with self._lock:
            self._present.pop(path, None)
            self._note()

    def sync_folder(self, folder: Path) -> None:
        with self._lock:
            before = {path: file for path, file in self._present.items() if path.parent == folder}
        super().sync_folder(folder)
        with self._lock:
            self._certain = {p: f for p, f in self._certain.items() if p.parent != folder} | before
            self._note()

    def committed(self) -> None:
        """A transaction is durable now."""
        image = {
            path: path.read_bytes()
            for path in (self.data / (INDEX_FILE + end) for end in ("", "-wal"))
            if path.exists()
        }
        with self._lock:
            if self.moments:
                self.moments[-1].next_index = image
            self._index = image
            self._note()

    def acknowledge(self, allowed: object) -> None:
        """From now on a power cut may leave these states, and no others."""
        with self._lock:
            self.allowed = allowed
            self._allowed_told = repr(allowed)
            self._note()

    def _note(self) -> None:
        contents = {id(file): file.durable for file in self._files}
        self.moments.append(
            Moment(
                dict(self._certain),
                dict(self._present),
                contents,
                self._index,
                allowed=self.allowed,
                allowed_told=self._allowed_told,
            )
        )


class RecordedDatabase(Database):
    """Tells the files after each transaction."""

    files: PowerlessFiles

    def apply(self, statements: Sequence[Statement], number: int | None = None) -> None:
        super().apply(statements, number)
        self.files.committed()


def put_down(image: Image, source: Path, target: Path) -> None:
    """Lay out what a power cut has left."""
    for path, content in image.items():
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
