"""The agents' manifests as they are found, brought up to date with the index. Blocking."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from warmkv_server.contract.names import AgentKey
from warmkv_server.kv.blocks.disk import QUARANTINE, quarantine
from warmkv_server.kv.blocks.files import Files
from warmkv_server.kv.catalog.evidence import Evidence
from warmkv_server.kv.catalog.manifest import FOLDER, Manifest, encode, file_name
from warmkv_server.kv.index.index import Agent, Index

log = logging.getLogger(__name__)


@dataclass
class UpToDate:
    """What `bring_up_to_date` has done.

    Attributes:
        sizes: bytes of the manifests there are.
        removed: manifests of no agent; temporary files are not among them.
        stale: agents whose manifest the disk refused.
    """

    sizes: dict[AgentKey, int] = field(default_factory=dict)
    written: int = 0
    removed: int = 0
    stale: list[Agent] = field(default_factory=list)


def bring_up_to_date(
    data_dir: Path, index: Index, number: int, files: Files, evidence: Evidence, quarantine_bytes: int
) -> UpToDate:
    """Have a manifest for each agent of the index, as the index has it. Blocking.

    What is no agent's is put into quarantine: somebody may have put it there, or want to know what it was.

    Args:
        number: of the index's last transaction.
        evidence: what there is; the index was compared with it.
    """
    folder = data_dir / FOLDER
    strays = {*evidence.manifests, *evidence.unreadable}
    found = UpToDate()
    contents: dict[Path, bytes] = {}
    changed: list[Agent] = []
    for agent in index.agents.values():
        path = folder / file_name(*agent.key)
        strays.discard(path)
        wanted = Manifest.of(agent, number)
        before, size = evidence.manifests.get(path, (None, 0))
        if before is None or not before.says_the_same(wanted):
            changed.append(agent)
            content = contents[path] = encode(wanted)
            size = len(content)
        found.sizes[agent.key] = size
    try:
        write(files, contents)
        found.written = len(changed)
    except OSError as error:
        log.warning("%d manifests wait for the disk, which refuses: %s", len(changed), error)
        found.stale = changed
    for path in strays:
        quarantine(files, path, data_dir / QUARANTINE, quarantine_bytes)
        found.removed += 1
    for path in evidence.temporary:
        files.unlink(path)
    if strays or evidence.temporary:
        files.sync_folders([folder])
    return found


def write(files: Files, contents: Mapping[Path, bytes]) -> None:
    for path, content in contents.items():
        files.write(path, [memoryview(content)])
    files.sync_folders({path.parent for path in contents})
