"""Index to rows and back: the statements of each change, and the reading of everything at start."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from warmkv_server.contract.kv import BLOCK_TOKENS, Fallback, PartKind, known_kind
from warmkv_server.kv.blocks.blockfile import Part
from warmkv_server.kv.blocks.names import TOKEN_BYTES, node_id
from warmkv_server.kv.catalog import plausible
from warmkv_server.kv.catalog.clock import Clock, Reading, TimeSource
from warmkv_server.kv.catalog.database import JournalDamaged, Queryable, Statement, as_json, insert
from warmkv_server.kv.index.index import Agent, Index, Node
from warmkv_server.kv.index.records import Fingerprint, RequestOutcome


def put_node(node: Node) -> Statement:
    """A node as it is now, new or changed. Writing it twice is harmless, so commits that share it need not wait."""
    return insert(
        "nodes",
        row=node.row,
        id=node.id,
        tenant=node.tenant,
        fingerprint=node.fingerprint,
        parent=node.parent,
        start=node.start,
        tokens=node.block_tokens,
        parts=_parts(node.parts),
        lost=node.lost,
        extra_key=node.extra_key,
    )


def update_node(node: Node) -> Statement:
    """What can change of a stored node: its files. Nothing if it is gone."""
    return "UPDATE nodes SET parts = ?, lost = ? WHERE row = ?", (_parts(node.parts), node.lost, node.row)


def delete_node(node: Node) -> Statement:
    return "DELETE FROM nodes WHERE row = ?", (node.row,)


def insert_agent(agent: Agent) -> Iterator[Statement]:
    """An agent that the journal doesn't have, whole."""
    yield insert(
        "agents",
        incarnation=agent.incarnation,
        tenant=agent.tenant,
        agent_id=agent.agent_id,
        create_time=agent.create_time,
        parent_agent_id=agent.parent_agent_id,
        **_context_columns(agent),
        **option_columns(agent),
    )
    yield from insert_chain(agent.incarnation, agent.nodes)
    yield from insert_snapshots(agent.incarnation, agent.snapshots)


def update_agent(agent: Agent) -> Statement:
    """All columns that a commit can change, of an agent that the journal has."""
    return update_columns(agent.incarnation, {**_context_columns(agent), **option_columns(agent)})


def update_columns(incarnation: int, columns: Mapping[str, Any]) -> Statement:
    names = ", ".join(f"{name} = ?" for name in columns)
    return f"UPDATE agents SET {names} WHERE incarnation = ?", (*columns.values(), incarnation)


def option_columns(agent: Agent) -> dict[str, Any]:
    return {"pinned": agent.pinned, "ttl": agent.ttl, "labels": as_json(agent.labels)}


def _context_columns(agent: Agent) -> dict[str, Any]:
    return {
        "fingerprint": agent.fingerprint,
        "revision": agent.revision,
        "kept": as_json(agent.kept),
        "previous": agent.previous,
        "ending": agent.ending,
        "update_time": agent.update_time,
        "last_used": agent.last_used,
    }


def insert_chain(incarnation: int, nodes: list[Node]) -> Iterator[Statement]:
    return (insert("chain", agent=incarnation, start=node.start, node=node.row) for node in nodes)


def insert_snapshots(incarnation: int, snapshots: Mapping[int, Node]) -> Iterator[Statement]:
    return (insert("snapshots", agent=incarnation, length=at, node=node.row) for at, node in snapshots.items())


def change_chain(incarnation: int, old: list[Node], new: list[Node]) -> Iterator[Statement]:
    """Cut where the lists begin to differ, append the rest."""
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a is not b), min(len(old), len(new)))
    if same < len(old):
        yield "DELETE FROM chain WHERE agent = ? AND start >= ?", (incarnation, old[same].start)
    yield from insert_chain(incarnation, new[same:])


def change_snapshots(incarnation: int, old: Mapping[int, Node], new: Mapping[int, Node]) -> Iterator[Statement]:
    for length, node in old.items():
        if new.get(length) is not node:
            yield "DELETE FROM snapshots WHERE agent = ? AND length = ?", (incarnation, length)
    yield from insert_snapshots(incarnation, {at: node for at, node in new.items() if old.get(at) is not node})


def delete_agent(incarnation: int) -> Iterator[Statement]:
    """Also of what a commit that was submitted before has added."""
    for table, column in (("agents", "incarnation"), ("chain", "agent"), ("snapshots", "agent")):
        yield f"DELETE FROM {table} WHERE {column} = ?", (incarnation,)


def insert_outcome(tenant: str, outcome: RequestOutcome, time: float) -> Statement:
    return insert(
        "outcomes",
        tenant=tenant,
        request_id=outcome.request_id,
        body_hash=outcome.body_hash,
        payload=outcome.payload,
        time=time,
    )


def delete_outcomes(before: float) -> Statement:
    return "DELETE FROM outcomes WHERE time < ?", (before,)


def put_fingerprint(fingerprint: Fingerprint) -> Statement:
    sql = (
        "INSERT INTO fingerprints (digest, fields) VALUES (?, ?) "
        "ON CONFLICT (digest) DO UPDATE SET fields = excluded.fields"
    )
    return sql, (fingerprint.digest, as_json(dict(fingerprint.fields)))


def delete_fingerprint(digest: str) -> Statement:
    return "DELETE FROM fingerprints WHERE digest = ?", (digest,)


def spare(name: str) -> Statement:
    """A block file that no agent references, and that no start may remove."""
    return "INSERT OR IGNORE INTO spared VALUES (?)", (name,)


def spare_none() -> Statement:
    return "DELETE FROM spared", ()


def put_vocabulary(fingerprint: str, size: int) -> Statement:
    return "INSERT OR REPLACE INTO vocabularies VALUES (?, ?)", (fingerprint, size)


def read_spared(db: Queryable) -> set[str]:
    return {name for (name,) in _of_addition(db, "SELECT name FROM spared")}


def read_vocabularies(db: Queryable) -> dict[str, int]:
    """By fingerprint: token ids are below."""
    return {str(digest): int(size) for digest, size in _of_addition(db, "SELECT fingerprint, size FROM vocabularies")}


def _of_addition(db: Queryable, sql: str) -> list[tuple[Any, ...]]:
    """Nothing, in an index of a version that didn't have the table."""
    return db.query(sql) if db.query("SELECT 1 FROM sqlite_master WHERE name = 'vocabularies'") else []


def read_fingerprints(db: Queryable) -> dict[str, Fingerprint]:
    rows = db.query("SELECT digest, fields FROM fingerprints")
    return {digest: Fingerprint(json.loads(fields), digest) for digest, fields in rows}


def read_outcomes(db: Queryable, first: int) -> Iterator[tuple[str, RequestOutcome, float]]:
    """Tenant, outcome and time of each from this row on."""
    for tenant, request_id, body_hash, payload, time in db.query(
        "SELECT tenant, request_id, body_hash, payload, time FROM outcomes WHERE row >= ? ORDER BY row", (first,)
    ):
        yield tenant, RequestOutcome(request_id, body_hash, payload), time


def put_clock(reading: Reading) -> list[Statement]:
    """The table is made here, so that an index of before it was needed gets it too."""
    table = "time REAL, wall REAL, elapsed REAL, boot TEXT, shift REAL, away REAL"
    return [
        (f"CREATE TABLE IF NOT EXISTS clock (one INTEGER PRIMARY KEY, {table})", ()),
        insert("clock", one=1, **asdict(reading)),
    ]


def read_clock(db: Queryable, index: Index, source: TimeSource | None = None) -> Clock:
    """The store's time, going on from what the journal says of it."""
    there = db.query("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'clock'")
    found = db.query("SELECT time, wall, elapsed, boot, shift, away FROM clock") if there else []
    used = (agent.last_used for agent in index.agents.values())
    return Clock(Reading.of_row(found[0]) if found else None, used, source)


def read_outcome_sizes(db: Queryable) -> list[tuple[int, int, float]]:
    """Row, bytes and time of each, newest first."""
    return db.query("SELECT row, length(payload) + length(request_id), time FROM outcomes ORDER BY row DESC")


def find_outcome(tenant: str, request_id: str) -> Statement:
    """A query for its body_hash and payload."""
    sql = "SELECT body_hash, payload FROM outcomes WHERE tenant = ? AND request_id = ? ORDER BY row DESC LIMIT 1"
    return sql, (tenant, request_id)


def read_index(db: Queryable) -> Index:
    """Nodes and agents. Which windows are needed depends on the layout, so that is left to the caller.

    Raises:
        JournalDamaged: the tables can't be read, or contradict each other.
    """
    try:
        return _read_index(db)
    except sqlite3.OperationalError:
        raise
    except (sqlite3.DatabaseError, ValueError, TypeError, AttributeError) as error:
        raise JournalDamaged(f"its rows make no sense: {error}") from error


def _read_index(db: Queryable) -> Index:
    index = Index()
    by_row: dict[int, Node] = {}
    for row, ident, tenant, fingerprint, parent, start, tokens, parts, lost, extra_key in db.query(
        "SELECT row, id, tenant, fingerprint, parent, start, tokens, parts, lost, extra_key FROM nodes"
    ):
        node = Node(ident, row, tenant, fingerprint, parent, start, tokens, extra_key=extra_key)
        node.saved, node.dirty = True, False
        node.parts = {known_kind(kind): _part(*values) for kind, values in json.loads(parts).items()}
        node.lost = Fallback(lost) if lost else None
        if not 0 <= start < 1 << 31 or len(tokens) % TOKEN_BYTES or not 0 <= node.count <= BLOCK_TOKENS:
            raise JournalDamaged(f"node {row} is of tokens that can't be")
        if node_id(parent, start, tokens, extra_key) != ident:
            raise JournalDamaged(f"the id of node {row} is not that of its tokens")
        by_row[row] = index.nodes[ident] = node
    chains: dict[int, list[Node]] = {}
    for incarnation, row in db.query(
        "SELECT agent, node FROM chain WHERE agent IN (SELECT incarnation FROM agents) ORDER BY agent, start"
    ):
        chains.setdefault(incarnation, []).append(_node(by_row, row))
    snapshots: dict[int, dict[int, Node]] = {}
    for incarnation, length, row in db.query(
        "SELECT agent, length, node FROM snapshots WHERE agent IN (SELECT incarnation FROM agents)"
    ):
        snapshots.setdefault(incarnation, {})[length] = _node(by_row, row)
    for columns in db.query(
        "SELECT incarnation, tenant, agent_id, fingerprint, revision, kept, previous, pinned, ttl, labels,"
        " create_time, update_time, last_used, parent_agent_id, ending FROM agents"
    ):
        incarnation, tenant, agent_id, fingerprint, revision, kept, previous, pinned, ttl, labels, *rest = columns
        agent = Agent(tenant, agent_id, incarnation, fingerprint, durable=True, saved=True)
        agent.nodes = chains.get(incarnation, [])
        if any(node.start != end for node, end in zip(agent.nodes, [0, *(n.end for n in agent.nodes)], strict=False)):
            raise JournalDamaged(f"the blocks of agent {agent_id!r} don't follow each other")
        agent.snapshots = snapshots.get(incarnation, {})
        agent.tokens = join_tokens(agent.nodes)
        agent.revision, agent.kept, agent.previous = revision, tuple(json.loads(kept)), previous
        agent.pinned, agent.ttl, agent.labels = bool(pinned), ttl, json.loads(labels)
        agent.create_time, agent.update_time, agent.last_used, agent.parent_agent_id, agent.ending = rest
        wrong = plausible.violation(agent, len(agent.tokens)) or plausible.token_violation(agent.tokens, None)
        if wrong is not None:
            index.implausible.append((agent, wrong))
            continue
        index.add_agent(agent)
        for node in agent.all_nodes():
            node.last_used = max(node.last_used, agent.last_used)
    index.next_row = max(by_row, default=0) + 1
    (used,) = db.query("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'agents'")[0]
    index.next_incarnation = used + 1
    return index


def join_tokens(nodes: list[Node]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The token log of a list of nodes, read-only."""
    tokens = np.frombuffer(b"".join(node.own_tokens for node in nodes), "<i4").astype(np.int32)
    tokens.flags.writeable = False
    return tokens


def _node(by_row: Mapping[int, Node], row: int) -> Node:
    try:
        return by_row[row]
    except KeyError as error:
        raise JournalDamaged(f"an agent refers to node {row}, which isn't there") from error


def _part(nbytes: int, digest: str) -> Part:
    if type(nbytes) is not int or not 0 <= nbytes < 1 << 63 or not isinstance(digest, str):
        raise JournalDamaged("a block file of a size or a checksum that can't be")
    return Part(nbytes, digest)


def _parts(parts: Mapping[PartKind, Part]) -> str:
    return as_json({kind: [part.nbytes, part.digest] for kind, part in parts.items()})
