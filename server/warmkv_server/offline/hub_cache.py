"""Models of a hub that this machine has: huggingface_hub's own cache, which other programs use, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HFCacheInfo, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from warmkv_server.errors import OperatorError

_SHORT = 12


@dataclass(frozen=True)
class CachedModel:
    """One revision of a model.

    Attributes:
        refs: branches and tags that stand for it, such as main.
        nbytes: of its files, also those that it shares with another revision.
        last_used: seconds since 1970, as far as the filesystem tells.
    """

    name: str
    revision: str
    refs: tuple[str, ...]
    nbytes: int
    files: int
    last_used: float
    path: str

    @property
    def spec(self) -> str:
        """As --model takes it."""
        return f"{self.name}@{self.revision[:_SHORT]}"


def models() -> list[CachedModel]:
    """By name, the newest revision of each first."""
    scan = _scan()
    found = [
        (
            revision.last_modified,
            CachedModel(
                repo.repo_id,
                revision.commit_hash,
                tuple(sorted(revision.refs)),
                revision.size_on_disk,
                revision.nb_files,
                repo.last_accessed,
                str(revision.snapshot_path),
            ),
        )
        for repo in (scan.repos if scan is not None else ())
        if repo.repo_type == "model"
        for revision in repo.revisions
    ]
    return [model for _, model in sorted(found, key=lambda each: (each[1].name, -each[0]))]


def fetch(spec: str) -> tuple[Path, int]:
    """Have the files of ORG/NAME[@REV] that serving needs; shows on a terminal's stderr how far that is.

    Returns:
        The folder, and the bytes in it.

    Raises:
        OperatorError: it is not a hub's, or can't be fetched.
    """
    from warmkv_server.contract.model import ModelKind
    from warmkv_server.engine.model.locate import locate

    kind, folder = locate(spec)
    if kind is not ModelKind.HUB:
        raise OperatorError(f"{spec} is on this machine already; pull takes ORG/NAME[@REV] of a hub")
    return folder, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove(spec: str) -> tuple[list[CachedModel], int]:
    """Delete a model, ORG/NAME, or one revision of it, ORG/NAME@REV: a branch, a tag, or the first digits of a commit.

    Returns:
        What is gone, and the bytes that are free now.

    Raises:
        OperatorError: there is no such model, or the cache refuses.
    """
    name, _, revision = spec.partition("@")
    of_name = [model for model in models() if model.name == name]
    chosen = [m for m in of_name if not revision or revision in m.refs or m.revision.startswith(revision)]
    if not chosen:
        raise OperatorError(f"the cache {cache_dir()} has no {spec}; {_has(of_name)}")
    if revision and len(chosen) > 1:
        raise OperatorError(f"{spec} stands for {len(chosen)} revisions of the cache; {_has(chosen)}")
    scan = _scan()
    assert scan is not None
    strategy = scan.delete_revisions(*(model.revision for model in chosen))
    strategy.execute()
    if left := [model for model in chosen if Path(model.path).exists()]:
        raise OperatorError(f"{left[0].path} can't be removed; change its permissions")
    return chosen, strategy.expected_freed_size


def cache_dir() -> Path:
    return Path(constants.HF_HUB_CACHE)


def _scan() -> HFCacheInfo | None:
    try:
        return scan_cache_dir(cache_dir())
    except CacheNotFound:
        return None


def _has(of_name: Sequence[CachedModel]) -> str:
    if not of_name:
        return "`warmkv models ls` lists what it has"
    return f"it has {', '.join(model.spec for model in of_name)}"
