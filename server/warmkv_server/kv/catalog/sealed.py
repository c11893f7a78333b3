"""JSON with a checksum over itself as its first entry: what manifests of agents, on disk and in archives, are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

_HEAD = b'{"xxh3_128":"'
_DIGEST_HEX = 32


class Damaged(Exception):
    """The checksum is another, or there is none."""


def seal(described: Mapping[str, Any]) -> bytes:
    """The content of a file with these entries, of which there is at least one."""
    rest = b'",' + json.dumps(described, separators=(",", ":")).encode()[1:]
    return _HEAD + _checksum(rest) + rest


def unseal(content: bytes) -> dict[str, Any]:
    """What was sealed.

    Raises:
        Damaged
        ValueError, RecursionError: the checksum is right, and it is not JSON all the same.
    """
    at = len(_HEAD) + _DIGEST_HEX
    if not content.startswith(_HEAD) or content[len(_HEAD) : at] != _checksum(content[at:]):
        raise Damaged("damaged: the checksum is another, or there is none")
    described: dict[str, Any] = json.loads(content)
    del described["xxh3_128"]
    return described


def _checksum(rest: bytes) -> bytes:
    """xxh3-128 of the whole with zeros in the checksum's place, in hex."""
    hasher = xxhash.xxh3_128(_HEAD + b"0" * _DIGEST_HEX)
    hasher.update(rest)
    return hasher.hexdigest().encode()
