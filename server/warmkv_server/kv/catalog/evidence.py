"""What a data directory says of its agents besides the index, and whether the index can be the last one.

SQLite can't tell an index that has lost its last transactions, or was replaced by an older copy, from a whole one. The
agents' manifests and the log of commits can: they are written after the index, so no number in them is above its own,
and a deletion removes the manifest before the row. Where this doesn't hold, the index is not believed, and nothing that
only it calls garbage is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from warmkv_server.contract.names import AgentKey
from warmkv_server.kv.blocks.files import TEMP_SUFFIX, entries, is_plain, read_file
from warmkv_server.kv.catalog import commit_log
from warmkv_server.kv.catalog.commit_log import Told
from warmkv_server.kv.catalog.manifest import FOLDER, SUFFIX, BadManifest, Manifest, decode, file_name
from warmkv_server.kv.index.index import Index

MANIFEST_LIMIT = 64 << 20
"""Bytes of a manifest at most."""


@dataclass
class Evidence:
    """
    Attributes:
        manifests: those that can be read, by path, with their bytes.
        unreadable: those that can't, and why; nobody knows whose they are.
        temporary: what a crash left behind.
        strange: what else lies in the folder of manifests.
        told: what the log of commits says.
    """

    manifests: dict[Path, tuple[Manifest, int]] = field(default_factory=dict)
    unreadable: dict[Path, str] = field(default_factory=dict)
    temporary: list[Path] = field(default_factory=list)
    strange: list[Path] = field(default_factory=list)
    told: Told = field(default_factory=Told)

    @property
    def number(self) -> int:
        """The highest transaction that anything tells of."""
        return max([self.told.number, *(manifest.number for manifest, _ in self.manifests.values())])

    def against(self, index: Index, number: int) -> str | None:
        """Why an index, whose last transaction has this number, can't be the last one; None if it can."""
        if number < self.number:
            return f"it ends with transaction {number}, and transaction {self.number} was made durable"
        lost = [m for m, _ in self.manifests.values() if (m.tenant, m.agent_id) not in index.agents]
        lost = [m for m in lost if not self._deleted(m)]
        if lost:
            return f"it doesn't know {len(lost)} agents that have manifests, {lost[0].agent_id!r} among them"
        return None

    def living(self) -> Iterator[tuple[AgentKey, list[Manifest]]]:
        """Agents that were not deleted, with what is known of each, the newest first."""
        found: dict[AgentKey, list[Manifest]] = {}
        for manifest, _ in self.manifests.values():
            if not self._deleted(manifest):
                found[AgentKey(manifest.tenant, manifest.agent_id)] = [manifest]
        for key, last in self.told.agents.items():
            if isinstance(last, Manifest):
                # At one number the file is the newer one: it has the tokens of blocks that went meanwhile.
                found[key] = sorted([*found.get(key, []), last], key=lambda each: -each.number)
        yield from found.items()

    def _deleted(self, manifest: Manifest) -> bool:
        last = self.told.agents.get(AgentKey(manifest.tenant, manifest.agent_id))
        return isinstance(last, int) and last >= manifest.number


def gather(data_dir: Path) -> Evidence:
    """Blocking. Changes nothing."""
    found = Evidence(told=commit_log.read(data_dir))
    for entry in sorted(entries(data_dir / FOLDER), key=lambda each: each.name):
        path = Path(entry.path)
        if not is_plain(entry) or not entry.name.endswith((SUFFIX, TEMP_SUFFIX)):
            found.strange.append(path)
        elif entry.name.endswith(TEMP_SUFFIX):
            found.temporary.append(path)
        else:
            try:
                content = read_file(path, MANIFEST_LIMIT)
                manifest = decode(content)
                if path.name != file_name(manifest.tenant, manifest.agent_id):
                    raise BadManifest("it is another agent's, under this name")
                found.manifests[path] = manifest, len(content)
            except BadManifest as bad:
                found.unreadable[path] = str(bad)
            except OSError as error:
                found.unreadable[path] = error.strerror or str(error)
    return found
