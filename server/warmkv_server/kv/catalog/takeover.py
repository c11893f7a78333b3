"""Taking over a data directory of format 1, in place: no tensor is written again.

Names of files get their digest, which is in the file's header: each file gets a second name first (a hard link), then
one transaction turns the index into one of format 2, then the old names go. Killed between, a server of format 1 still
finds what it had until the transaction, and one of format 2 goes on here. Headers stay as they are: format 2 reads
them, and node ids are the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from warmkv_server.contract.kv import PartKind, all_kinds
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks import blockfile
from warmkv_server.kv.blocks.disk import BLOCKS, QUARANTINE, block_files, quarantine
from warmkv_server.kv.blocks.files import Files, in_words, is_plain, open_file
from warmkv_server.kv.blocks.names import SUFFIX, object_name

log = logging.getLogger(__name__)

_OLD_NAME = re.compile(r"([0-9a-f]{32})\.([a-z]+)" + re.escape(SUFFIX))


class TakeOver:
    """Of one directory, whose lock is held. Blocking."""

    def __init__(self, data_dir: Path, files: Files, quarantine_limit: int) -> None:
        self._data_dir = data_dir
        self._files = files
        self._limit = quarantine_limit
        self._old: dict[Path, str] = {}
        """Files under a name of format 1, each with its name of format 2."""

    def begin(self) -> dict[str, str]:
        """Have every file of format 1 under its name of format 2 too. Returns old name → new, for the index.

        Raises:
            OperatorError: the disk refuses; nothing is lost, and the next start goes on.
        """
        try:
            self._name_files()
        except OSError as error:
            raise OperatorError(
                f"{in_words(self._data_dir)} is of format 1 and can't be taken over ({error}); see that its disk has "
                "room and can be written, and start again: it goes on where it was"
            ) from error
        return {path.name: name for path, name in self._old.items()}

    def finish(self) -> None:
        """Let the old names go, now that the index knows the new ones."""
        for path in self._old:
            with contextlib.suppress(OSError):  # The next start does it.
                self._files.unlink(path)
        if self._old:
            log.warning("took over %d files of format 1 in %s", len(self._old), in_words(self._data_dir))

    def _name_files(self) -> None:
        folders: set[Path] = set()
        for entry in list(block_files(self._data_dir)):  # all of them, before there are others
            path = Path(entry.path)
            found = _OLD_NAME.fullmatch(entry.name)
            if (
                found is None
                or found[2] not in all_kinds()
                or path.parent.name != entry.name[:2]
                or not is_plain(entry)
            ):
                continue
            digest = _digest(path)
            if digest is None:
                log.warning("%s has no header of a block; it is put into quarantine", in_words(path))
                quarantine(self._files, path, self._data_dir / QUARANTINE, self._limit)
                continue
            name = self._old[path] = object_name(found[1], PartKind(found[2]), digest)
            try:
                self._files.link(path, path.with_name(name))
            except OSError:
                self._files.rename(path, path.with_name(name))  # a file system without links
            folders.add(path.parent)
        self._files.sync_folders(sorted(folders))


def _digest(path: Path) -> str | None:
    """What the header says is the file's checksum; None if it has none."""
    try:
        fd = open_file(path)
    except FileNotFoundError:
        return None
    try:
        head = os.pread(fd, blockfile.DIGEST_AT + blockfile.DIGEST_HEX, 0)
    finally:
        os.close(fd)
    return blockfile.digest_in(head)


def old_files(data_dir: Path) -> Iterable[Path]:
    """Files under names of format 1."""
    return (
        Path(entry.path)
        for entry in block_files(data_dir)
        if _OLD_NAME.fullmatch(entry.name) and Path(entry.path).parent.parent.name == BLOCKS
    )
