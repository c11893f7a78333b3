"""`warmkv agents import`: an archive becomes an agent of a data directory, or nothing changes.

The order is the store's own: files, each checked before it is written, then their folders, then one transaction. What
the directory has already under a node's id stays: the first committed file of an id wins.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from warmkv_server.contract.kv import PartKind, TensorSpec
from warmkv_server.contract.names import AGENT_ID, AGENT_ID_RULE, AgentKey
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.blockfile import BadFile, Parsed, Part, expect, renamed
from warmkv_server.kv.blocks.files import open_file
from warmkv_server.kv.blocks.names import object_name, root_id
from warmkv_server.kv.catalog import plausible, rows
from warmkv_server.kv.catalog.signing import key_of
from warmkv_server.kv.index.index import Agent, Node, block_info
from warmkv_server.kv.index.records import Fingerprint
from warmkv_server.offline import placing
from warmkv_server.offline.archive import ArchiveReader, BadArchive
from warmkv_server.offline.directory import Taken, usable_tokens

Specs = Mapping[PartKind, Sequence[TensorSpec]]


@dataclass(frozen=True)
class Imported:
    """
    Attributes:
        usable_tokens: how many of its tokens, from the first, have KV.
        files, nbytes: block files written; what the directory had already is not among them.
        shared: others who ask for the same tokens get its KV.
    """

    tenant: str
    agent_id: str
    tokens: int
    usable_tokens: int
    revision: int
    files: int
    nbytes: int
    shared: bool


@contextlib.contextmanager
def opened(path: Path) -> Iterator[ArchiveReader]:
    """An archive whose manifest is good and makes sense.

    Raises:
        OperatorError: it can't be read or isn't one; also for what the block meets in it.
    """
    try:
        with os.fdopen(open_file(path, follow=True), "rb") as file:
            reader = ArchiveReader(file, os.fstat(file.fileno()).st_size)
            placing.check(reader.manifest)
            yield reader
    except BadArchive as bad:
        raise OperatorError(f"{path} can't be imported: {bad}; nothing was changed") from bad
    except OSError as error:
        raise OperatorError(f"{path} can't be read: {error.strerror or error}") from error


def require_same_model(theirs: Fingerprint, ours: Sequence[Fingerprint], where: str) -> Fingerprint:
    """Which of ours an archive is of. One of version 1 is of whatever is the same in all that version 1 covered.

    Args:
        ours: what is acceptable.
        where: what that is, in words.

    Raises:
        OperatorError: names the fields that differ from the likest one.
    """
    for each in ours:
        if theirs.fields in (each.fields, each.in_version_1().fields):
            return each
    if not ours:
        raise OperatorError(
            f"{where} was not served with a model yet; give --model, and the KV flags with which it will be served"
        )
    likest = min(ours, key=lambda each: len(theirs.differing(each)))
    differing = [
        f"{name} ({_brief(theirs, name)} in the archive, {_brief(likest, name)} here)"
        for name in theirs.differing(likest)
    ]
    raise OperatorError(f"the archive's KV is useless to {where}: it differs in {', '.join(differing)}")


def import_agent(
    reader: ArchiveReader,
    taken: Taken,
    *,
    fingerprint: Fingerprint,
    tenant: str,
    agent_id: str,
    replace: bool,
    trust: bool,
    specs: Specs | None,
    vocabulary: int | None,
) -> Imported:
    """
    Args:
        fingerprint: of the model that it will belong to; see `require_same_model`.
        tenant, agent_id: what it becomes.
        replace: an agent of that name goes; otherwise it is refused.
        trust: the operator says that the KV is what the model computes for these tokens.
        specs: of the model that will serve it, if known: then each tensor is checked against them.
        vocabulary: of that model: token ids are below. None if the directory isn't to know either.

    Raises:
        OperatorError, BadArchive: nothing has changed.
    """
    if not plausible.is_text(tenant):
        raise OperatorError("the tenant's name is no text")
    if not AGENT_ID.fullmatch(agent_id):
        raise OperatorError(f"{agent_id!r} can't be an agent_id; it {AGENT_ID_RULE}")
    old = taken.index.agents.get(AgentKey(tenant, agent_id))
    if old is not None and not replace:
        of = f" of tenant {tenant!r}" if tenant else ""
        raise OperatorError(
            f"there is an agent {agent_id!r}{of} in {taken.data_dir} already; give --as NEW_ID, or --replace"
        )
    written: dict[str, int] = {}
    told = reader.manifest
    signed = told.is_signed_with(key_of(taken.data_dir))
    fingerprint = fingerprint.as_known(taken.fingerprints)
    root = placing.root_for(told, tenant, fingerprint.digest, trusted=trust, signed=signed)
    try:
        taken.settle()
        agent = _place(reader, taken, fingerprint.digest, tenant, agent_id, root)
        vocabulary = taken.vocabularies.get(agent.fingerprint) if vocabulary is None else vocabulary
        if (wrong := plausible.token_violation(agent.tokens, vocabulary)) is not None:
            raise BadArchive(wrong)
        _write_files(reader, taken, agent, specs, written)
        taken.tier.sync(written)
        gone = _swap(taken, old, agent)
        statements = [rows.put_fingerprint(fingerprint)]
        statements += [rows.put_node(node) for node in agent.all_nodes()]
        statements += [] if old is None else rows.delete_agent(old.incarnation)
        statements += [*rows.insert_agent(agent), *(rows.delete_node(node) for node in gone)]
        taken.database.apply(statements)
    except BaseException as error:
        for name in written:
            with contextlib.suppress(OSError):  # The next start of a server sweeps it.
                taken.tier.delete(name)
        if isinstance(error, OSError):
            raise OperatorError(f"the disk refuses ({error.strerror or error}); nothing was changed") from error
        raise
    for node in gone:
        for name in node.object_names():
            taken.tier.delete(name)
    return Imported(
        tenant,
        agent_id,
        len(agent.tokens),
        usable_tokens(agent),
        agent.revision,
        len(written),
        sum(written.values()),
        root == root_id(tenant, agent.fingerprint),
    )


def _place(reader: ArchiveReader, taken: Taken, fingerprint: str, tenant: str, agent_id: str, root: bytes) -> Agent:
    """The agent with its nodes: those that the directory has, and new ones without files."""
    index, told = taken.index, reader.manifest.agent
    agent = Agent(tenant, agent_id, index.new_incarnation(), fingerprint)

    def known(node: Node) -> Node:
        there = index.nodes.get(node.id)
        if there is None:
            node.row = index.new_row()
            index.nodes[node.id] = there = node
        return there

    nodes, snapshots = placing.placed(reader.manifest, tenant, fingerprint, root)
    agent.nodes = [known(node) for node in nodes]
    agent.snapshots = {length: known(node) for length, node in snapshots.items()}
    agent.tokens = rows.join_tokens(agent.nodes)
    agent.revision, agent.kept, agent.previous, agent.ending = told.revision, told.kept, told.previous, told.ending
    agent.pinned, agent.ttl, agent.labels = told.pinned, told.ttl, told.labels
    agent.create_time, agent.update_time, agent.parent_agent_id = (
        told.create_time,
        told.update_time,
        told.parent_agent_id,
    )
    agent.last_used = taken.clock.now()
    return agent


def _write_files(
    reader: ArchiveReader, taken: Taken, agent: Agent, specs: Specs | None, written: dict[str, int]
) -> None:
    """Check every file of the archive, and write those that the directory lacks."""
    manifest, tier = reader.manifest, taken.tier
    ours = dict(zip((n.id for n in (*manifest.nodes, *manifest.snapshots)), agent.all_nodes(), strict=True))
    for theirs, kind, content, parsed in reader.files():
        _require(parsed, theirs, kind, specs)
        node = ours[theirs.id]
        if kind in node.parts and tier.path(node.object_name(kind, node.parts[kind])).exists():
            continue
        digest, buffers = parsed.digest, [memoryview(content)]
        if node.id != theirs.id:
            head, payload, digest = renamed(content, block_info(node, kind))
            buffers = [memoryview(head), payload]
        name = object_name(node.id.hex(), kind, digest)
        written[name] = 0
        written[name] = tier.put(name, buffers)
        node.parts[kind] = Part(written[name], digest)
        node.lost = theirs.lost


def _require(parsed: Parsed, node: Node, kind: PartKind, specs: Specs | None) -> None:
    try:
        if specs is not None:
            expect(parsed, block_info(node, kind), specs[kind])
        elif parsed.info != block_info(node, kind):
            raise BadArchive(f"its block {node.id.hex()} ({kind}) is of another node")
    except BadFile as bad:
        raise BadArchive(f"its block {node.id.hex()} ({kind}) doesn't fit the model: {bad}") from bad


def _swap(taken: Taken, old: Agent | None, new: Agent) -> list[Node]:
    """Put the new agent into the index in the place of the old one. Returns the nodes that nobody references now."""
    if old is not None:
        taken.index.remove_agent(old)
    taken.index.add_agent(new)
    gone = [] if old is None else [node for node in set(old.all_nodes()) if not node.refs]
    for node in gone:
        del taken.index.nodes[node.id]
    return gone


def _brief(fingerprint: Fingerprint, name: str) -> str:
    value = fingerprint.fields.get(name, "")
    return f"{value[:12]}…" if len(value) > 12 else value or "none"
