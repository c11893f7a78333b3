"""One server for each data directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.files import open_private

FILE_NAME = "lock"


class DirectoryLock:
    """Held from construction to `release`, and let go by the system if the process dies."""

    def __init__(self, data_dir: Path) -> None:
        """
        Raises:
            OperatorError: another process has it, or the directory can't be written.
        """
        path = data_dir / FILE_NAME
        try:
            self._fd = open_private(path, os.O_RDWR)
        except OSError as error:
            raise OperatorError(
                f"the data directory {data_dir} can't be written ({error.strerror}); "
                "give another with --data-dir, or change its permissions"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self._fd)
            raise OperatorError(
                f"the data directory {data_dir} is in use by {holder}; stop that one, or give another with --data-dir"
            ) from error
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # For people only: a full disk doesn't keep a server out.
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}, started {now}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)
