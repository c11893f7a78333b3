"""A tier that the store has never heard of: one class, and the store's state machine is passed with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from tests.kv.disk import RefusingFiles
from tests.kv.test_model import SETTINGS, StoreMachine
from tests.kv.words import LAYOUTS
from warmkv_server.kv.blocks.tier import Tidied


class Held:
    """An object as it was when it was opened."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.nbytes = len(content)
        self.version = id(content)

    def prefetch(self) -> None:
        """It is in RAM."""

    def read(self, at: int, nbytes: int) -> bytes:
        return self._content[at : at + nbytes]

    def read_into(self, memory: memoryview, at: int) -> int:
        piece = self._content[at : at + len(memory)]
        memory[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """It costs nothing."""


class RamTier:
    """Objects in a dictionary, which refuses when the disk is to refuse."""

    def __init__(self, objects: dict[str, bytes], files: RefusingFiles) -> None:
        self.objects = objects
        self.aside: dict[str, bytes] = {}
        self._files = files

    def _perhaps_refuse(self) -> None:
        if self._files.refusal is not None:
            raise OSError(self._files.refusal, os.strerror(self._files.refusal))

    def put(self, name: str, buffers: Sequence[memoryview]) -> int:
        self._perhaps_refuse()
        content = b"".join(buffers)
        self.objects[name] = content
        return len(content)

    def sync(self, _: Iterable[str]) -> None:
        self._perhaps_refuse()

    def open(self, name: str) -> Held:
        return Held(self.get(name))

    def get(self, name: str) -> bytes:
        if name not in self.objects:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self.objects[name]

    def delete(self, name: str) -> None:
        self._perhaps_refuse()
        self.objects.pop(name, None)

    def list(self) -> Iterator[tuple[str, int]]:
        yield from [(name, len(content)) for name, content in list(self.objects.items())]

    def tidy(self) -> Tidied:
        return Tidied()

    def set_aside(self, name: str, version: object) -> int:
        self._perhaps_refuse()
        if name in self.objects and id(self.objects[name]) == version:
            self.aside[name] = self.objects.pop(name)
        return sum(map(len, self.aside.values()))

    def resident_bytes(self, _: Iterable[str]) -> int:
        return -1

    def drop_pages(self, _: Iterable[str]) -> None:
        """They are where they are."""


class RamMachine(StoreMachine):
    layout = LAYOUTS["everything"]

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[str, bytes] = {}

    def tier(self) -> RamTier:
        return RamTier(self.blocks, self.files)

    def fork_tier(self) -> Callable[[], None]:
        now = dict(self.blocks)

        def go_on() -> None:
            self.blocks = now

        return go_on

    def objects(self) -> list[str]:
        return sorted(self.blocks)

    def content(self, name: str) -> bytes:
        return self.blocks[name]

    def put_content(self, name: str, content: bytes | None) -> None:
        if content is None:
            del self.blocks[name]
        else:
            self.blocks[name] = content


TestRam = RamMachine.TestCase
TestRam.settings = SETTINGS
