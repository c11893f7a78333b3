"""What the codecs of a model's streams are made of, found out once and then kept.

Found out anew, the constants would differ in their last bits on another machine, or with another number of threads, and
words that were made with others could no longer be read. So they are kept beside the contexts, under a digest of what
they follow from; a digest of the constants themselves is part of each codec's identity, and so of the fingerprint.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from warmkv_server.contract.kv_choice import AFFINE, EXACT, CodecName, KvChoice
from warmkv_server.engine.cache.codecs.affine import AffineCodec
from warmkv_server.engine.cache.codecs.as_computed import AsComputed
from warmkv_server.engine.cache.codecs.codec import Codec, CodecPlan, Finding, Stream
from warmkv_server.engine.cache.codecs.rotation import Rotation
from warmkv_server.engine.cache.codecs.transform import Basis, TransformCodec
from warmkv_server.errors import OperatorError

log = logging.getLogger(__name__)

VERSION = 2
"""Of such files; constants of another one are found out anew."""

_HEAD = b"warmkv-constants %d " % VERSION
_DIGEST_HEX = 32


@dataclass(frozen=True)
class StreamConstants:
    """Of one layer's keys or values.

    Attributes:
        group_size: values that share a scale; 0 if none do.
        basis: of codecs that change it; else None.
        rotated_by: the module whose rotation is undone; "" if none is.
    """

    codec: CodecName
    group_size: int
    finding: Finding
    basis: Basis | None = None
    rotated_by: str = ""


@dataclass(frozen=True)
class Constants:
    """Of all streams of a model."""

    streams: Mapping[Stream, StreamConstants]

    @cached_property
    def digest(self) -> str:
        """Of what words depend on."""
        digest = xxhash.xxh3_64()
        for stream, own in sorted(self.streams.items(), key=lambda each: each[0]):
            digest.update(repr((stream, str(own.codec), own.group_size, own.rotated_by)).encode())
            if own.basis is not None:
                for part in vars(own.basis).values():
                    digest.update(np.ascontiguousarray(part, dtype="<f8").tobytes())
        return digest.hexdigest()

    def plan(self, asked: KvChoice, rotations: Mapping[str, Rotation], group_size: int) -> CodecPlan:
        """The codecs.

        Args:
            rotations: by the names of the modules.
            group_size: that was asked for.
        """
        codecs = {stream: self._codec(own, rotations) for stream, own in self.streams.items()}
        findings = {stream: own.finding for stream, own in self.streams.items()}
        default = AffineCodec(max(asked.keys.bits, asked.values.bits), group_size)
        return CodecPlan(default, codecs, asked, findings)

    def _codec(self, own: StreamConstants, rotations: Mapping[str, Rotation]) -> Codec:
        kind, bits = own.codec
        if kind == EXACT:
            return AsComputed()
        if kind == AFFINE:
            return AffineCodec(bits, own.group_size)
        assert own.basis is not None
        rotation = rotations[own.rotated_by] if own.rotated_by else None
        return TransformCodec(kind, bits, own.group_size, own.basis, self.digest, rotation)

    def encode(self) -> bytes:
        """The content of a file, with a checksum."""
        told = []
        arrays: dict[str, Any] = {}
        for number, (stream, own) in enumerate(self.streams.items()):
            told.append([*stream, *own.codec, own.group_size, *own.finding, own.rotated_by, own.basis is not None])
            if own.basis is not None:
                # Whole numbers times powers of two, and 32-bit numbers: nothing is lost.
                arrays |= {f"{number}.{name}": part.astype("<f4") for name, part in vars(own.basis).items()}
        content = io.BytesIO()
        np.savez_compressed(content, streams=np.frombuffer(json.dumps(told).encode(), np.uint8), **arrays)
        body = content.getvalue()
        return _HEAD + xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body

    @classmethod
    def decode(cls, content: bytes) -> Constants:
        """
        Raises:
            ValueError: it is damaged.
        """
        head = len(_HEAD) + _DIGEST_HEX + 1
        body = content[head:]
        if content[:head] != _HEAD + xxhash.xxh3_128_hexdigest(body).encode() + b"\n":
            raise ValueError("the checksum is another, or there is none")
        try:
            arrays = dict(np.load(io.BytesIO(body), allow_pickle=False))
        except zipfile.BadZipFile as error:
            raise ValueError(str(error)) from error
        streams: dict[Stream, StreamConstants] = {}
        for number, told in enumerate(json.loads(arrays["streams"].tobytes())):
            leaf, side, kind, bits, group_size, loss, reason, rotated_by, changes = told
            basis = None
            if changes:
                names = (field.name for field in dataclasses.fields(Basis))
                basis = Basis(*(arrays[f"{number}.{name}"].astype(np.float64) for name in names))
            codec = CodecName(kind, bits)
            streams[leaf, side] = StreamConstants(codec, group_size, Finding(loss, reason), basis, rotated_by)
        return cls(streams)


def kept(folder: Path, key: str) -> Constants | None:
    """Those that were found out before; None if they weren't, or can't be read any more."""
    path = folder / f"{key}.npz"
    try:
        return Constants.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        log.warning("%s can't be read (%s): what was computed with it will be computed anew", path, error)
        path.rename(path.with_suffix(".damaged"))
        return None


def keep(folder: Path, key: str, found: Constants) -> Constants:
    """Have them found by the next start. Returns those that are kept: of several who keep some, the first one's.

    Raises:
        OperatorError: they can't be.
    """
    path = folder / f"{key}.npz"
    try:
        for own in (folder.parent, folder):
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{key}.", suffix=".tmp") as file:
            file.write(found.encode())
            file.flush()
            os.fsync(file.fileno())
            try:
                os.link(file.name, path)
            except FileExistsError:
                return kept(folder, key) or found
        for changed in (folder, folder.parent):
            descriptor = os.open(changed, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise OperatorError(
            f"what the KV's codec needs to know of the model can't be kept in {folder} ({error.strerror}), and without "
            "it what is stored could not be read again; change --data-dir, or give --kv affine4"
        ) from error
    return found
