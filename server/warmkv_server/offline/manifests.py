"""Whether the agents' manifests would do what they are there for: build a lost index anew.

Beside a running server they are behind its commits for a moment, and they and what they refer to come and go. So what
looks wrong counts only if it still is when the file has not changed meanwhile, with a newer state of the index.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from warmkv_server.contract.names import AgentKey
from warmkv_server.kv.blocks.files import TEMP_SUFFIX, entries, is_plain, read_file
from warmkv_server.kv.catalog.builder import Builder, NotRebuildable
from warmkv_server.kv.catalog.evidence import MANIFEST_LIMIT
from warmkv_server.kv.catalog.manifest import FOLDER, SUFFIX, BadManifest, Manifest, decode, file_name
from warmkv_server.offline.directory import View, in_use
from warmkv_server.offline.findings import Problem, Report, Trouble, name_of, short


def check_manifests(look: Callable[[], View], report: Report) -> None:
    """Add what is wrong with them to the report, in which the block files have been checked. Changes nothing.

    Args:
        look: reads the index; called once more for a manifest that looks wrong.
    """
    view = look()
    folder = view.data_dir / FOLDER
    for entry in sorted(entries(folder), key=lambda each: each.name):
        path = Path(entry.path)
        if not is_plain(entry):
            report.notes.append(f"{short(path)} is not a file of WarmKV")
        elif path.name.endswith(TEMP_SUFFIX):
            report.notes.append(f"{short(path)} is a temporary file; the next start of a server removes it")
        elif not path.name.endswith(SUFFIX):
            report.notes.append(f"{short(path)} is not a file of WarmKV")
        else:
            report.manifests += 1
            if _examine(path, _content(path), view) is not None:
                problem = _still_wrong(path, look)
                if problem is not None:
                    report.problems.append(problem)
    _note_hurt(view, report)
    if not in_use(view.data_dir):
        _note_behind(view, report)


def _still_wrong(path: Path, look: Callable[[], View]) -> Problem | None:
    content: bytes | OSError | None = None
    while True:
        before, content = content, _content(path)
        problem = _examine(path, content, look())
        if problem is None or isinstance(content, OSError) or content == before:
            return problem


def _content(path: Path) -> bytes | OSError | None:
    """None for a manifest that has just gone with its agent."""
    try:
        return read_file(path, MANIFEST_LIMIT)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error


def _examine(path: Path, content: bytes | OSError | None, view: View) -> Problem | None:
    if content is None:
        return None
    if isinstance(content, OSError):
        return Problem(Trouble.UNREADABLE, short(path), content.strerror or str(content))
    try:
        manifest = decode(content)
    except BadManifest as bad:
        return Problem(Trouble.DAMAGED, short(path), f"{bad}; the next start of a server writes it anew")
    name = name_of(manifest.tenant, manifest.agent_id)
    if path.name != file_name(manifest.tenant, manifest.agent_id):
        return Problem(Trouble.DAMAGED, short(path), f"it is the manifest of {name}, under another name")
    agent = view.index.agents.get(AgentKey(manifest.tenant, manifest.agent_id))
    if agent is None:
        return Problem(Trouble.UNKNOWN, short(path), f"the index doesn't have its {name}")
    if manifest.says_the_same(Manifest.of(agent)):
        return None  # What it refers to are the agent's own blocks, which have been checked.
    reason = _not_rebuildable(manifest, view)
    detail = f"{name} would be lost with the index: {reason}; the next start of a server writes it anew"
    return None if reason is None else Problem(Trouble.NOT_REBUILDABLE, short(path), detail)


def _not_rebuildable(manifest: Manifest, view: View) -> NotRebuildable | None:
    """Why not, from the block files that are there now."""
    try:
        Builder(view.data_dir, view.tier).add(manifest)
    except NotRebuildable as reason:
        return reason
    return None


def _note_hurt(view: View, report: Report) -> None:
    """Agents whose tokens are in the index alone, now that a block file is bad."""
    hurt = {bad.node.id for bad in report.bad if bad.node is not None}
    for agent in view.index.agents.values():
        if not hurt.isdisjoint(node.id for node in agent.nodes):
            reason = _not_rebuildable(Manifest.of(agent), view)
            if reason is not None:
                report.notes.append(
                    f"{name_of(*agent.key)} would be lost if the index were lost as well: {reason}; the next start of "
                    "a server, or --quarantine, writes these into its manifest"
                )


def _note_behind(view: View, report: Report) -> None:
    """A crash may come between a commit and its manifest, which nobody waits for."""
    behind = []
    for key, agent in view.index.agents.items():
        content = _content(view.data_dir / FOLDER / file_name(*key))
        try:
            if isinstance(content, bytes) and decode(content).says_the_same(Manifest.of(agent)):
                continue
        except BadManifest:
            continue  # a problem of its own
        behind.append(name_of(*key))
    if behind:
        report.notes.append(
            f"{len(behind)} of {len(view.index.agents)} agents have no manifest, or one that is behind their last "
            f"commit (the first is {behind[0]}); the next start of a server writes them"
        )
