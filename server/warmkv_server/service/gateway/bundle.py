"""A tokenizer's files as one archive, in pieces that clients take."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping

from smg_grpc_proto.generated import common_pb2 as common

_PIECE_BYTES = 1 << 20


def archive(files: Mapping[str, bytes]) -> bytes:
    """A zip, the same for the same files."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in sorted(files):
            # Without a time, which a name alone would get.
            packed.writestr(zipfile.ZipInfo(name), files[name], zipfile.ZIP_DEFLATED)
    return written.getvalue()


def chunks(packed: bytes) -> Iterator[common.GetTokenizerChunk]:
    """The archive's pieces; the last has its digest."""
    for first in range(0, len(packed), _PIECE_BYTES):
        piece = packed[first : first + _PIECE_BYTES]
        is_last = first + _PIECE_BYTES >= len(packed)
        yield common.GetTokenizerChunk(data=piece, sha256=hashlib.sha256(packed).hexdigest() if is_last else "")
