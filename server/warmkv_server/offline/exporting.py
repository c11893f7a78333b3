"""`warmkv agents export`: the last committed context of one agent, every block of it read and checked."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from warmkv_server.contract.kv import Fallback, PartKind
from warmkv_server.contract.store import Durability
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.blockfile import BadFile, Part, verify
from warmkv_server.kv.blocks.files import TEMP_SUFFIX, Files
from warmkv_server.kv.catalog.signing import key_of
from warmkv_server.kv.index.index import Node, block_info
from warmkv_server.offline.archive import ArchiveManifest, ArchiveWriter
from warmkv_server.offline.directory import View, find_agent, usable_tokens


@dataclass(frozen=True)
class Exported:
    """
    Attributes:
        usable_tokens: how many of its tokens, from the first, have KV in the archive.
        nbytes: of the archive.
    """

    tokens: int
    usable_tokens: int
    revision: int
    files: int
    nbytes: int


def export(view: View, tenant: str, agent_id: str, target: Path) -> Exported:
    """Write the archive under its name once it is whole and synced.

    Raises:
        OperatorError: there is no such agent, a block of it is bad, the target exists, or its disk refuses.
    """
    agent = find_agent(view, tenant, agent_id)
    if os.path.lexists(target):
        raise OperatorError(f"{target} exists already; remove it, or give another name with -o")
    if agent.fingerprint not in view.fingerprints:
        raise OperatorError(f"the index has lost what model agent {agent_id!r} belongs to; it can't be exported")
    fingerprint, digests = view.fingerprints[agent.fingerprint], {}
    for node, kind, part in ArchiveManifest.of(agent, fingerprint).files():
        digests[node.id, kind] = hashlib.sha256(_read(view, node, kind, part)).hexdigest()
    manifest = ArchiveManifest.of(agent, fingerprint, digests)
    files = Files(Durability.FULL)
    temp = target.with_name(f"{target.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        fd = files.create(temp)
        try:
            with os.fdopen(fd, "wb", closefd=False) as file:
                writer = ArchiveWriter(file, manifest, key_of(view.data_dir))
                for node, kind, part in manifest.files():
                    content = _read(view, node, kind, part)
                    if hashlib.sha256(content).hexdigest() != digests[node.id, kind]:
                        raise OperatorError(f"the block files of agent {agent_id!r} change meanwhile; try again")
                    writer.add(node, kind, content)
                writer.finish()
            nbytes = os.fstat(fd).st_size
            files.sync(fd)
        finally:
            os.close(fd)
        files.rename(temp, target)
        files.sync_folder(target.absolute().parent)
    except OSError as error:
        raise OperatorError(f"{target} can't be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            files.unlink(temp)
    count = sum(1 for _ in manifest.files())
    return Exported(len(agent.tokens), usable_tokens(agent), agent.revision, count, nbytes)


def file_names(view: View, folder: Path, tenant: str | None) -> dict[tuple[str, str], Path]:
    """A file in the folder for each agent, by tenant and agent_id; of one tenant's alone, or of all. Makes the folders.
    Hidden agents have none.

    Raises:
        OperatorError: there is no agent, or a folder can't be made.
    """
    agents = view.index.agents.items()
    wanted = sorted(key for key, agent in agents if tenant in (None, key.tenant) and not agent.hidden)
    if not wanted:
        raise OperatorError(f"there is no agent in {view.data_dir}" + (f" of tenant {tenant!r}" if tenant else ""))
    names: dict[tuple[str, str], Path] = {}
    taken: Counter[Path] = Counter()
    for owner, agent_id in wanted:
        place = folder / quote(owner, safe="") if owner else folder
        # Filesystems may take Ada and ada for one name, which ids are not.
        same = place / agent_id.casefold()
        again = f"~{taken[same]}" if taken[same] else ""
        taken[same] += 1
        names[owner, agent_id] = place / f"{quote(agent_id, safe='')}{again}.warmkv"
    try:
        for place in {file.parent for file in names.values()}:
            place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorError(f"{folder} can't be made a folder: {error.strerror or error}") from error
    return names


def _read(view: View, node: Node, kind: PartKind, part: Part) -> bytes:
    name = node.object_name(kind, part)
    path = view.tier.path(name)
    try:
        content = view.tier.get(name)
        parsed = verify(content)
        if parsed.digest != part.digest or parsed.info != block_info(node, kind):
            raise BadFile(Fallback.FORMAT, "it is not the one that the index has")
    except FileNotFoundError as error:
        raise OperatorError(
            f"{path} is gone; if a server runs, the agent has changed meanwhile: try again, and else "
            "`warmkv store verify` says more"
        ) from error
    except OSError as error:
        raise OperatorError(f"{path} can't be read: {error.strerror}") from error
    except BadFile as bad:
        raise OperatorError(
            f"{path} is bad ({bad}); `warmkv store verify --quarantine` puts it away, and what is left can be exported"
        ) from bad
    return content
