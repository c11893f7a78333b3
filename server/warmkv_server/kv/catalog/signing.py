"""The key of a data directory: what it signs came from here, and can be trusted as what it has."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.files import read_file

FILE_NAME = "key"
_KEY_BYTES = 32


def make_key(data_dir: Path) -> None:
    """Have one, which nobody but the directory's owner can read. Made once; blocking.

    Raises:
        OperatorError: the disk refuses.
    """
    path = data_dir / FILE_NAME
    temp = data_dir / f"{FILE_NAME}.new"
    if os.path.lexists(path):
        return
    try:
        temp.unlink(missing_ok=True)
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
            os.write(fd, secrets.token_bytes(_KEY_BYTES))
            os.fsync(fd)
        finally:
            os.close(fd)
        temp.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise OperatorError(
            f"the key of the data directory {data_dir} can't be made ({error.strerror or error}); free disk space, or "
            "change the folder's permissions"
        ) from error


def key_of(data_dir: Path) -> bytes | None:
    """None where there is none that can be used: then nothing is signed, and no signature is right."""
    try:
        key = read_file(data_dir / FILE_NAME, _KEY_BYTES)
    except OSError:
        return None
    return key if len(key) == _KEY_BYTES else None


def sign(key: bytes, content: bytes) -> str:
    """HMAC-SHA256 in hex."""
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def is_signed(key: bytes | None, content: bytes, signature: object) -> bool:
    return (
        key is not None
        and isinstance(signature, str)
        and hmac.compare_digest(sign(key, content).encode(), signature.encode(errors="replace"))
    )
