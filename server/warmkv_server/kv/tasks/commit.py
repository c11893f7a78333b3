"""Making a new context an agent's own: files first, then one transaction.

A commit pins the nodes that it works on, so that nothing it counts on is collected meanwhile. In its last step the
transaction comes first and the index second, so that nobody sees what may yet be lost; see `Core.last_step`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace

import numpy as np

from warmkv_server.contract.kv import all_kinds
from warmkv_server.contract.names import AgentKey, is_hidden
from warmkv_server.errors import AgentDeleted, AgentExists, MemoryBudget, StorageUnavailable
from warmkv_server.kv.blocks.writer import RequestKV
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.catalog.commit_log import lives
from warmkv_server.kv.catalog.database import Statement
from warmkv_server.kv.catalog.stored_outcomes import KeptOutcome
from warmkv_server.kv.index.index import Agent, Node
from warmkv_server.kv.index.plan import Plan, Planner
from warmkv_server.kv.index.records import Commit, Committed, RequestOutcome, Unset
from warmkv_server.kv.tasks.collect import Collector
from warmkv_server.kv.tasks.core import Core
from warmkv_server.kv.tasks.manifests import Manifests
from warmkv_server.kv.tasks.parts import PartWriter, WriteResult

log = logging.getLogger(__name__)


@dataclass
class Ticket:
    """A commit in flight on one agent. `deleted` is set if it was to make an agent that has been deleted before."""

    done: asyncio.Future[None]
    deleted: bool = False


@dataclass
class _State:
    """What an agent referenced before a commit, and whether the journal has exactly that."""

    nodes: list[Node]
    snapshots: dict[int, Node]
    in_journal: bool

    @classmethod
    def of(cls, agent: Agent | None) -> _State:
        if agent is None:
            return cls([], {}, in_journal=False)
        return cls(list(agent.nodes), dict(agent.snapshots), agent.saved and agent.durable)

    def all_nodes(self) -> list[Node]:
        return [*self.nodes, *self.snapshots.values()]


class Committer:
    """Used on the event loop's thread. One commit of an agent at a time; those of others don't wait for it.

    Attributes:
        tickets: of the commits in flight, by agent.
        not_durable: agents whose last commit is in RAM only, and the pinned nodes of the state that the journal has.
    """

    def __init__(self, core: Core, writer: PartWriter, collector: Collector, manifests: Manifests) -> None:
        self._core = core
        self._writer = writer
        self._collector = collector
        self._manifests = manifests
        self._planner = Planner(core.index, core.layout, core.fingerprint, core.has)
        self.tickets: dict[AgentKey, Ticket] = {}
        self.not_durable: dict[Agent, list[Node]] = {}

    async def commit(self, commit: Commit) -> Committed:
        """See `Store.commit`. The caller keeps the lease's nodes pinned for as long as this runs."""
        began = time.perf_counter()
        key = AgentKey(commit.tenant, commit.agent_id)
        ticket = await self._take_ticket(key)
        try:
            agent = self._agent(commit, ticket)
            _check(commit)
            plan = await self._plan(commit, agent)
            nodes = plan.all_nodes()
            self._adopt(nodes)
            try:
                result = await self._writer.write(key, plan.parts, RequestKV(commit.reuse, commit.growth))
                async with self._core.last_step(key):
                    return await self._finish(commit, self._agent(commit, ticket), plan, result, began)
            finally:
                self._let_go(nodes)
        finally:
            self._return_ticket(key, ticket)

    async def _retry(self, agent: Agent) -> bool:
        """Try to make the last commit of an agent durable after all."""
        core = self._core
        ticket = await self._take_ticket(agent.key)
        nodes = list(agent.all_nodes())
        for node in nodes:
            node.pins += 1
        try:
            unsaved = ((node, kind) for node in nodes for kind in all_kinds())
            result = await self._writer.write_unsaved(agent.key, unsaved)
            async with core.last_step(agent.key):
                if result.refusal is not None or core.index.agents.get(agent.key) is not agent:
                    return False
                statements = [rows.put_node(node) for node in nodes]
                statements += [*rows.delete_agent(agent.incarnation), *rows.insert_agent(agent)]
                if not await self._transact(agent, agent, statements, nodes):
                    return False
                self._note_durable(agent, [])
                return True
        finally:
            self._let_go(nodes)
            self._return_ticket(agent.key, ticket)

    async def retry_all(self) -> bool:
        """Retry until the disk refuses again. Whether everything is durable afterwards."""
        for agent in list(self.not_durable):
            if agent in self.not_durable and not await self._retry(agent):
                break
        return not self.not_durable

    def forget(self, agent: Agent) -> None:
        """The agent is gone from the journal, or the journal has its last commit: its old state isn't needed."""
        self._let_go(self.not_durable.pop(agent, []))
        self._core.disk.note(len(self.not_durable))

    @contextlib.asynccontextmanager
    async def working_on(self, key: AgentKey, nodes: Iterable[Node]) -> AsyncIterator[None]:
        """Keep commits away from an agent, and what it is made of from collection. Nothing may be in flight on it."""
        nodes = list(nodes)
        ticket = self.tickets[key] = Ticket(asyncio.get_running_loop().create_future())
        for node in nodes:
            node.pins += 1
        try:
            yield
        finally:
            self._let_go(nodes)
            self._return_ticket(key, ticket)

    async def idle(self, key: AgentKey) -> None:
        """Wait until no commit is in flight on an agent."""
        while (ticket := self.tickets.get(key)) is not None:
            await asyncio.shield(ticket.done)

    async def _take_ticket(self, key: AgentKey) -> Ticket:
        await self.idle(key)
        ticket = self.tickets[key] = Ticket(asyncio.get_running_loop().create_future())
        return ticket

    def _return_ticket(self, key: AgentKey, ticket: Ticket) -> None:
        del self.tickets[key]
        ticket.done.set_result(None)

    def _agent(self, commit: Commit, ticket: Ticket) -> Agent | None:
        agent = self._core.index.agents.get(AgentKey(commit.tenant, commit.agent_id))
        gone = commit.incarnation is not None and (agent is None or agent.incarnation != commit.incarnation)
        if ticket.deleted or gone:
            raise AgentDeleted(f"agent {commit.agent_id!r} was deleted while the request ran", agent_id=commit.agent_id)
        if commit.incarnation is None and agent is not None:
            raise AgentExists(
                f"agent {commit.agent_id!r} was created while the request ran; send it again", agent_id=commit.agent_id
            )
        return agent

    async def _plan(self, commit: Commit, agent: Agent | None) -> Plan:
        while True:
            plan = self._planner.plan(commit, agent, self._core.root(commit.tenant))
            if not self._collector.removing(plan.all_nodes()):
                return plan
            await self._collector.idle()

    def _adopt(self, nodes: Iterable[Node]) -> None:
        index = self._core.index
        for node in nodes:
            node.pins += 1
            if node.id not in index.nodes:
                node.row = index.new_row()
                self._core.accounts.enter(node)

    def _let_go(self, nodes: Iterable[Node]) -> None:
        nodes = list(nodes)
        for node in nodes:
            node.pins -= 1
        self._collector.suspect(nodes)
        self._core.hot.shrink()

    # The last step

    async def _finish(
        self, commit: Commit, agent: Agent | None, plan: Plan, result: WriteResult, began: float
    ) -> Committed:
        core = self._core
        if result.refusal is not None:
            self._bear(commit, result.refusal)
        before = _State.of(agent)
        after = self._after(commit, agent, plan)
        agent = agent or after
        outcome = self._outcome(commit, after, persisted=result.refusal is None)
        try:
            durable = result.refusal is None and await self._write_down(agent, after, before, plan, outcome)
        except Exception:
            # Nobody foresaw this, so nobody knows what the journal has: it is written whole, soon.
            self._put_into_index(agent, after)
            self._note_not_durable(agent, before)
            self._collector.suspect(before.all_nodes())
            raise
        if not durable and after.hidden:
            raise self._not_kept()
        self._put_into_index(agent, after)
        if durable:
            self._note_durable(agent, before.all_nodes())
        else:
            self._note_not_durable(agent, before)
            if result.refusal is None:
                outcome = self._outcome(commit, after, persisted=False)
        self._collector.suspect(before.all_nodes())
        if outcome is not None:
            kept = KeptOutcome(commit.tenant, outcome, core.clock.awake())
            if durable:
                core.outcomes.add(kept)
            else:
                core.outcomes.owe(kept, agent)
        return Committed(core.record(agent), durable, time.perf_counter() - began, result.bytes_written)

    async def _write_down(
        self, agent: Agent, after: Agent, before: _State, plan: Plan, outcome: RequestOutcome | None
    ) -> bool:
        """Have the journal take what the agent is to be."""
        statements = self._statements(after, before, plan)
        if outcome is not None:
            statements.append(rows.insert_outcome(after.tenant, outcome, self._core.clock.awake()))
        return await self._transact(agent, after, statements, plan.all_nodes())

    def _put_into_index(self, agent: Agent, after: Agent) -> None:
        """What was written down is what everybody sees from now on."""
        accounts = self._core.accounts
        if agent is after:
            accounts.add(agent)
        else:
            accounts.take(agent, after)
        for node in agent.all_nodes():
            node.last_used = max(node.last_used, agent.last_used)
        for node in reversed(agent.nodes):
            self._core.hot.touch(node)

    def _bear(self, commit: Commit, refusal: OSError) -> None:
        """Go on in RAM, if it has room. A hidden agent isn't worth any."""
        if is_hidden(commit.agent_id):
            raise self._not_kept() from refusal
        hot, outcomes = self._core.hot, self._core.outcomes
        # It can't be taken from anybody, so each tenant has its share from the start.
        alone = hot.unsaved_of(commit.tenant) > hot.limit // self._core.tenants.number
        if alone or hot.unsaved_bytes + outcomes.owed_bytes > hot.limit:
            raise MemoryBudget(
                "the disk refuses writes, and what it refused before fills the memory budget; free disk space",
                retry_after=self._core.tuning.retry_seconds,
                limit=hot.limit,
                actual=hot.unsaved_bytes + outcomes.owed_bytes,
                unit="bytes",
            )
        log.warning("the last commit of agent %r stays in RAM: %s", commit.agent_id, refusal)

    def _not_kept(self) -> StorageUnavailable:
        return StorageUnavailable(
            "the disk refuses writes, so that nothing is kept for whoever goes on with this",
            retry_after=self._core.tuning.retry_seconds,
        )

    def _note_durable(self, agent: Agent, replaced: Iterable[Node]) -> None:
        """
        Args:
            replaced: what the agent referenced before.
        """
        agent.saved = agent.durable = True
        self._manifests.note(agent, [*replaced, *self.not_durable.get(agent, [])])
        self.forget(agent)

    def _note_not_durable(self, agent: Agent, before: _State) -> None:
        agent.durable = False
        self._core.counters.commits_failed += 1
        if agent not in self.not_durable:
            # The journal still has the state before this one, and the next start would begin with it.
            for node in before.all_nodes():
                node.pins += 1
            self.not_durable[agent] = before.all_nodes()
            self._core.disk.note(len(self.not_durable))

    @staticmethod
    def _statements(agent: Agent, before: _State, plan: Plan) -> list[Statement]:
        statements = [rows.put_node(node) for node in plan.all_nodes() if node.dirty or not node.saved]
        if before.in_journal:
            statements.append(rows.update_agent(agent))
            statements += rows.change_chain(agent.incarnation, before.nodes, agent.nodes)
            statements += rows.change_snapshots(agent.incarnation, before.snapshots, agent.snapshots)
        else:
            statements += [*rows.delete_agent(agent.incarnation), *rows.insert_agent(agent)]
        return statements

    def _after(self, commit: Commit, agent: Agent | None, plan: Plan) -> Agent:
        """What the agent is to be; for a new one, the agent itself."""
        now = self._core.clock.now()
        same = agent is not None and agent.extra_key == commit.lease.extra_key
        changed = agent is None or not same or not np.array_equal(agent.tokens, commit.tokens)
        if agent is None:
            incarnation = self._core.index.new_incarnation()
            after = Agent(commit.tenant, commit.agent_id, incarnation, self._core.fingerprint)
            after.create_time, after.revision = now, 0
        else:
            after = replace(agent)
        after.nodes, after.snapshots, after.partial = plan.nodes, plan.snapshots, plan.partial
        if changed:
            after.tokens = commit.tokens.astype(np.int32)
            after.tokens.flags.writeable = False
            after.revision += 1
        after.fingerprint = self._core.fingerprint
        after.kept, after.previous, after.ending, after.last_used = plan.kept, plan.previous, commit.ending, now
        options = after.pinned, after.ttl, after.labels
        if not isinstance(commit.pinned, Unset):
            after.pinned = commit.pinned
        if not isinstance(commit.ttl, Unset):
            after.ttl = commit.ttl
        if not isinstance(commit.labels, Unset):
            after.labels = dict(commit.labels)
        if changed or options != (after.pinned, after.ttl, after.labels):
            after.update_time = now
        return after

    def _outcome(self, commit: Commit, after: Agent, *, persisted: bool) -> RequestOutcome | None:
        if commit.request is None or isinstance(commit.request, RequestOutcome):
            return commit.request
        after.durable = persisted
        return commit.request(self._core.record(self._core.accounts.sized(after)), persisted)

    async def _transact(self, agent: Agent, after: Agent, statements: list[Statement], nodes: Iterable[Node]) -> bool:
        """One transaction, with the outcomes of earlier commits that the journal doesn't have.

        Args:
            after: what it makes of the agent.
        """
        owed = self._core.outcomes.owed_by(agent) if agent in self.not_durable else []
        statements += [rows.insert_outcome(kept.tenant, kept.outcome, kept.time) for kept in owed]
        dirty = [node for node in nodes if node.dirty]
        for node in dirty:
            node.dirty = False  # Now, not afterwards: what changes meanwhile is for the next commit to write.
        try:
            await self._core.journal.apply(statements, lives(after))
        except BaseException as error:
            for node in dirty:
                node.dirty = True
            if not isinstance(error, OSError):
                raise
            log.warning("the last commit of agent %r stays in RAM: %s", agent.agent_id, error)
            return False
        for node in nodes:
            node.saved = True
        self._core.outcomes.paid(owed)
        return True


def _check(commit: Commit) -> None:
    reused = commit.reuse.length
    grown = commit.growth.count if commit.growth is not None else 0
    if reused + grown != len(commit.tokens) or (commit.growth is not None and commit.growth.start != reused):
        raise ValueError(f"{reused} reused and {grown} computed tokens don't make a context of {len(commit.tokens)}")
    if not np.array_equal(commit.tokens[:reused], commit.lease.tokens[:reused]):
        raise ValueError("the reused KV is of other tokens")
