"""The models that a directory was served with: what their fingerprints are made of, by digest.

The index has them, and a small file beside it, so that a lost index doesn't cost the KV of a model whose digest is an
older one than what would be computed today.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from warmkv_server.kv.blocks.files import Files, read_file
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.catalog.database import Queryable
from warmkv_server.kv.catalog.sealed import Damaged, seal, unseal
from warmkv_server.kv.index.index import Index
from warmkv_server.kv.index.records import Fingerprint

log = logging.getLogger(__name__)

FILE_NAME = "models.json"
FORMAT = "warmkv-models"
VERSION = 1
_LIMIT = 16 << 20


@dataclass
class KnownFingerprints:
    """
    Attributes:
        known: by digest.
        from_start: the file has been there before, so that the directory has been opened by format 2.
    """

    known: dict[str, Fingerprint]
    from_start: bool
    _path: Path
    _written: Mapping[str, Fingerprint]

    def of_old(self, index: Index) -> set[str]:
        """Digests of which nobody has the fields, that may be of format 1."""
        used = {agent.fingerprint for agent in index.agents.values()}
        return set() if self.from_start else used - self.known.keys()

    def keep(self, served: Fingerprint, files: Files) -> None:
        """Know this one too, durably but for a disk that refuses: then the index alone has it."""
        self.known[served.digest] = Fingerprint(served.fields, served.digest)
        if self.known == self._written:
            return
        described = {digest: dict(each.fields) for digest, each in self.known.items()}
        content = seal({"format": FORMAT, "version": VERSION, "fingerprints": described})
        try:
            files.write(self._path, [memoryview(content)])
            files.sync_folders([self._path.parent])
        except OSError as error:
            log.warning("the disk refuses %s, and the index alone has what is in it: %s", self._path.name, error)


def known_fingerprints(data_dir: Path, database: Queryable, index: Index) -> KnownFingerprints:
    """What the index says and, of those that its agents have and it has lost, the file beside it."""
    path = data_dir / FILE_NAME
    there, written = path.exists(), _read(path)
    used = {agent.fingerprint for agent in index.agents.values()}
    lost = {digest: each for digest, each in written.items() if digest in used}
    return KnownFingerprints({**lost, **rows.read_fingerprints(database)}, there, path, written)


def _read(path: Path) -> dict[str, Fingerprint]:
    try:
        told = unseal(read_file(path, _LIMIT))
        if told["format"] != FORMAT:
            return {}
        return {str(digest): Fingerprint(dict(fields), str(digest)) for digest, fields in told["fingerprints"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, Damaged, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s can't be read, and the index alone says which models were served: %s", path.name, error)
        return {}
