"""`warmkv store verify`: every block file against itself and against the index, every agent against its files, and
every agent's manifest.

Beside a running server, files come and go while this reads. So what looks wrong is looked at once more, with a newer
state of the index, and counts only if it is still so.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from warmkv_server.contract.kv import Fallback, PartKind
from warmkv_server.kv.blocks.blockfile import BadFile, BlockInfo
from warmkv_server.kv.blocks.disk import block_files, object_path, open_block
from warmkv_server.kv.blocks.files import TEMP_SUFFIX, is_plain
from warmkv_server.kv.blocks.names import SUFFIX, block_of, node_id, object_name, root_id
from warmkv_server.kv.blocks.reader import verify_block
from warmkv_server.kv.catalog.database import INDEX_FILE
from warmkv_server.kv.index.index import Agent, Node, block_info
from warmkv_server.offline.directory import View, in_use, usable_tokens
from warmkv_server.offline.findings import Bad, Problem, Report, Trouble, name_of, short
from warmkv_server.offline.manifests import check_manifests

_READERS = 4


def verify(look: Callable[[], View], watch: Callable[[Iterable[Path]], Iterable[Path]] = lambda paths: paths) -> Report:
    """Changes nothing.

    Args:
        look: reads the index; called once more if anything looks wrong.
        watch: passes on what it is given, and sees how far the reading is.

    Raises:
        OperatorError: the index can't be read.
    """
    view = look()
    report = Report(agents=len(view.index.agents))
    if view.not_the_last is not None:
        detail = f"{view.not_the_last}; the next start of a server, or `warmkv store rebuild-index`, builds it anew"
        report.problems.append(Problem(Trouble.DAMAGED, INDEX_FILE, detail))
    for agent, wrong in view.index.implausible:
        report.problems.append(Problem(Trouble.DAMAGED, name_of(agent.tenant, agent.agent_id), wrong))
    paths: list[Path] = []
    for entry in block_files(view.data_dir):
        path = Path(entry.path)
        if is_plain(entry) and entry.name.endswith(SUFFIX):
            paths.append(path)
            report.nbytes += _size(path)
        elif is_plain(entry) and entry.name.endswith(TEMP_SUFFIX):
            report.notes.append(f"{short(path)} is a temporary file; the next start of a server removes it")
        else:
            report.notes.append(f"{short(path)} is not a file of WarmKV")
    report.files = len(paths)
    bad = [*_examine_all(view, watch(paths)), *_missing(view)]
    if bad:
        view = look()
        gone = {each.path for each in bad if each.trouble is Trouble.MISSING}
        bad = [*_examine_all(view, [each.path for each in bad if each.path not in gone])]
        bad += [each for each in _missing(view) if each.path in gone]
    report.bad = [each for each in bad if not _in_the_making(view, each, report)]
    report.problems += [Problem(each.trouble, short(each.path), each.detail) for each in report.bad]
    report.problems += _agents(view, report)
    check_manifests(look, report)
    return report


def _examine_all(view: View, paths: Iterable[Path]) -> Iterator[Bad]:
    known = {
        object_path(view.data_dir, node.object_name(kind, part)): (node, kind)
        for node in view.index.nodes.values()
        for kind, part in node.parts.items()
    }
    with ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as readers:
        for found in readers.map(lambda path: _examine(path, *known.get(path, (None, None))), paths):
            if found is not None:
                yield found


def _examine(path: Path, node: Node | None, kind: PartKind | None) -> Bad | None:
    try:
        with contextlib.closing(open_block(path)) as block:
            parsed = verify_block(block)
    except FileNotFoundError:
        return None
    except BadFile as bad:
        return Bad(path, Trouble.DAMAGED, str(bad), node, kind)
    except OSError as error:
        return Bad(path, Trouble.UNREADABLE, error.strerror or str(error), node, kind)
    info = parsed.info
    if (wrong := _impossible(path, info, parsed.digest, node)) is not None:
        return Bad(path, Trouble.DAMAGED, wrong, node, kind)
    if node is None or kind is None:
        return Bad(path, Trouble.UNKNOWN, "the index doesn't have it; no agent uses it")
    expected = block_info(node, kind)
    if info != expected:
        names = [n for n in BlockInfo.__slots__ if getattr(info, n) != getattr(expected, n)]
        return Bad(path, Trouble.MISMATCH, f"the index has another {' and '.join(names)}", node, kind)
    return None


def _impossible(path: Path, info: BlockInfo, digest: str, node: Node | None) -> str | None:
    """What a header with a right checksum says that can't be.

    Args:
        node: what the index has under this name; of an imported context it begins below a root of its own.
    """
    if path.name != object_name(info.node, info.kind, digest) or path.parent.name != info.node[:2]:
        return f"it is the file of node {info.node} ({info.kind}) with the checksum {digest}, under another name"
    try:
        parent = bytes.fromhex(info.parent)
    except ValueError:
        return "the parent's id is no id"
    if node_id(parent, info.start, info.block_tokens, info.extra_key).hex() != info.node:
        return "the id is not that of these tokens"
    known = node is not None and node.parent == parent
    if block_of(info.start) == 0 and parent != root_id(info.tenant, info.fingerprint) and not known:
        return "it begins a context of another tenant or fingerprint"
    return None


def _missing(view: View) -> Iterator[Bad]:
    for node in view.index.nodes.values():
        for kind, part in node.parts.items():
            path = object_path(view.data_dir, node.object_name(kind, part))
            if not path.is_file() or path.is_symlink():
                yield Bad(path, Trouble.MISSING, "the index has it", node, kind)


def _in_the_making(view: View, bad: Bad, report: Report) -> bool:
    """A file that a running server has just written, or is about to remove: rows follow files, and go before them."""
    if bad.trouble is not Trouble.UNKNOWN or not in_use(view.data_dir):
        return False
    if bad.path.exists():
        report.notes.append(
            f"{short(bad.path)} is not in the index; the running server may be about to use or remove it"
        )
    return True


def _agents(view: View, report: Report) -> Iterator[Problem]:
    found: defaultdict[bytes, set[PartKind]] = defaultdict(set)
    for each in report.bad:
        if each.node is not None and each.kind is not None:
            found[each.node.id].add(each.kind)
    bad = {ident: frozenset(kinds) for ident, kinds in found.items()}
    for agent in view.index.agents.values():
        nodes = list(agent.all_nodes())
        name = name_of(agent.tenant, agent.agent_id)
        if not _contiguous(agent):
            yield Problem(Trouble.INCOMPLETE, name, "its blocks don't follow each other")
            continue
        hurt = sum(node.id in bad or node.lost is not None for node in nodes)
        if not hurt:
            continue
        usable = usable_tokens(agent, bad)
        detail = f"{hurt} of its {len(nodes)} blocks are not whole; at most {usable} of its {len(agent.tokens)} tokens"
        detail += " can be reused, the rest is computed anew"
        if any(node.id in bad or node.lost not in (None, Fallback.MISSING_BLOCK) for node in nodes):
            yield Problem(Trouble.INCOMPLETE, name, detail)
        else:
            report.notes.append(f"{name}: {detail} (a disk quota took them, or an earlier start missed them)")


def _contiguous(agent: Agent) -> bool:
    end = 0
    for node in agent.nodes:
        if node.start != end:
            return False
        end = node.end
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
