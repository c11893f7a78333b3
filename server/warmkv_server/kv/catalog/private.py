"""Contexts are conversations: nobody but the server's user reads what a data directory holds."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from warmkv_server.kv.blocks.files import entries, in_words

log = logging.getLogger(__name__)

FOLDER_MODE = 0o700
FILE_MODE = 0o600


def make_folder(path: Path) -> bool:
    """Have a private folder; whether it is new. Blocking.

    Raises:
        OSError
    """
    try:
        path.mkdir(FOLDER_MODE)
    except FileExistsError:
        if path.is_dir():
            return False
        raise
    path.chmod(FOLDER_MODE)  # Whatever the umask takes away.
    return True


def tighten(data_dir: Path, is_own: Callable[[str], bool]) -> None:
    """Take from others what they may do with what is there; said in one line. Blocking.

    Args:
        is_own: whether a name in the directory is the store's. If there are others, somebody else uses the folder too,
            and its own mode is left alone.
    """
    shared = any(not is_own(entry.name) for entry in entries(data_dir))
    changed = refused = 0
    for path, mode in [*([] if shared else [(data_dir, data_dir.stat().st_mode)]), *_walk(data_dir, is_own)]:
        if not mode & 0o077:
            continue
        try:
            path.chmod(stat.S_IMODE(mode) & FOLDER_MODE)
            changed += 1
        except OSError:
            refused += 1
    if changed:
        log.warning("others could use %d files and folders of %s; they can't any more", changed, in_words(data_dir))
    if refused:
        log.warning("others may use %d files and folders of %s; their owner can change it", refused, in_words(data_dir))


def _walk(data_dir: Path, is_own: Callable[[str], bool]) -> Iterator[tuple[Path, int]]:
    """Files and folders with their modes; neither links nor what isn't the store's."""
    waiting = [data_dir]
    while waiting:
        folder = waiting.pop()
        for entry in entries(folder):
            if folder == data_dir and not is_own(entry.name):
                continue
            try:
                mode = entry.stat(follow_symlinks=False).st_mode
            except OSError:
                continue  # gone, or nobody may look
            if stat.S_ISDIR(mode):
                waiting.append(Path(entry.path))
            if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
                yield Path(entry.path), mode
