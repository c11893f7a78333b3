"""Where the store's bytes live: immutable objects by name, behind one protocol. The local disk is the first tier.

An object's name tells its bytes (`names.py`): whoever puts one under a name that is there already puts the same bytes
there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Block(Protocol):
    """An object that is open to be read. Used by one thread.

    Attributes:
        nbytes: of the object.
        version: tells these bytes from others that were under the same name before or are afterwards.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def version(self) -> object: ...

    def prefetch(self) -> None:
        """It will be read whole, soon."""

    def read(self, at: int, nbytes: int) -> bytes:
        """So many bytes from there on; fewer at the end.

        Raises:
            OSError
        """

    def read_into(self, memory: memoryview, at: int) -> int:
        """Fill the memory, or some of it, with what is there; how many bytes. 0 at the end.

        Raises:
            OSError
        """

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tidied:
    """
    Attributes:
        removed: leftovers.
        strange: what is there and isn't an object; it is left alone.
    """

    removed: int = 0
    strange: tuple[Path, ...] = ()


class BlockTier(Protocol):
    """Blocking, and used from several threads at once. A bucket fits as well as a disk: nothing is ever changed in
    place, listed in an order, or locked."""

    def put(self, name: str, buffers: Sequence[memoryview]) -> int:
        """Have an object with these bytes. Returns how many. It counts once `sync` has been told of it.

        Raises:
            OSError: the tier refuses. Nothing is under the name then that was not before.
        """

    def sync(self, names: Iterable[str], /) -> None:
        """Make what was put under these names durable, if it isn't by now; some may be gone again.

        Raises:
            OSError: it may not be.
        """

    def open(self, name: str) -> Block:
        """
        Raises:
            FileNotFoundError: there is none.
            OSError: it can't be read now.
        """

    def get(self, name: str) -> bytes:
        """All of it.

        Raises:
            FileNotFoundError, OSError: as for `open`.
        """

    def delete(self, name: str) -> None:
        """Nothing where there is none.

        Raises:
            OSError: the tier refuses.
        """

    def list(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every object, in no order. What comes and goes meanwhile may be missing."""

    def tidy(self) -> Tidied:
        """Remove what puts that were cut short have left behind.

        Raises:
            OSError: the tier refuses.
        """

    def set_aside(self, name: str, version: object) -> int:
        """Take a bad object away for somebody to look at; not if its bytes are others by now. Returns the bytes that
        are set aside altogether.

        Raises:
            OSError: the tier refuses.
        """

    def resident_bytes(self, names: Iterable[str], /) -> int:
        """Bytes of these that the system holds in RAM for itself; -1 where that can't be known."""

    def drop_pages(self, names: Iterable[str], /) -> None:
        """Ask the system to let go of these."""
