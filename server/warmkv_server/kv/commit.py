"""Making a new context an agent's own: files first, then one transaction.

A commit pins the nodes that it works on, so that nothing it counts on is collected meanwhile. It ends in one step on
the event loop's thread, in which the index changes and the transaction is submitted. Transactions run in the order in
which they were submitted, so a delete that comes later also deletes what the commit has just added.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from warmkv_server.errors import AgentDeleted, AgentExists, MemoryBudget
from warmkv_server.kv import rows
from warmkv_server.kv.collect import Collector
from warmkv_server.kv.commit_log import lives
from warmkv_server.kv.core import Core, KeptOutcome
from warmkv_server.kv.index import Agent, AgentKey, Node
from warmkv_server.kv.journal import Statement
from warmkv_server.kv.manifests import Manifests
from warmkv_server.kv.parts import Effort, PartWriter
from warmkv_server.kv.plan import Plan, Planner
from warmkv_server.kv.records import Commit, Committed, RequestOutcome, Unset
from warmkv_server.kv.types import PartKind
from warmkv_server.kv.words import Words

log = logging.getLogger(__name__)


@dataclass
class Ticket:
    """A commit in flight on one agent. `deleted` is set if the agent is deleted before the commit's last step."""

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
        ticket = await self._take_ticket((commit.tenant, commit.agent_id))
        try:
            agent = self._agent(commit, ticket)
            _check(commit)
            plan = await self._plan(commit, agent)
            nodes = plan.all_nodes()
            self._adopt(nodes)
            try:
                effort = await self._writer.write(plan.parts, Words(commit.reuse, commit.growth))
                return await self._finish(commit, self._agent(commit, ticket), plan, effort, began)
            finally:
                self._let_go(nodes)
        finally:
            self._return_ticket((commit.tenant, commit.agent_id), ticket)

    async def _retry(self, agent: Agent) -> bool:
        """Try to make the last commit of an agent durable after all."""
        core = self._core
        ticket = await self._take_ticket(agent.key)
        nodes = list(agent.all_nodes())
        for node in nodes:
            node.pins += 1
        try:
            effort = await self._writer.write_unsaved((node, kind) for node in nodes for kind in PartKind)
            gone = agent.deleting or core.index.agents.get(agent.key) is not agent
            if effort.refusal is not None or gone:
                return False
            statements = [rows.put_node(node) for node in nodes]
            statements += [*rows.delete_agent(agent.incarnation), *rows.insert_agent(agent)]
            return await self._apply(agent, statements, nodes, [])
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

    async def _take_ticket(self, key: AgentKey) -> Ticket:
        while (before := self.tickets.get(key)) is not None:
            await asyncio.shield(before.done)
        ticket = self.tickets[key] = Ticket(asyncio.get_running_loop().create_future())
        return ticket

    def _return_ticket(self, key: AgentKey, ticket: Ticket) -> None:
        del self.tickets[key]
        ticket.done.set_result(None)

    def _agent(self, commit: Commit, ticket: Ticket) -> Agent | None:
        agent = self._core.index.agents.get((commit.tenant, commit.agent_id))
        gone = commit.incarnation is not None and (agent is None or agent.incarnation != commit.incarnation)
        if ticket.deleted or gone or (agent is not None and agent.deleting):
            raise AgentDeleted(f"agent {commit.agent_id!r} was deleted while the request ran")
        if commit.incarnation is None and agent is not None:
            raise AgentExists(f"agent {commit.agent_id!r} was created while the request ran; send it again")
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
                index.nodes[node.id] = node

    def _let_go(self, nodes: Iterable[Node]) -> None:
        nodes = list(nodes)
        for node in nodes:
            node.pins -= 1
        self._collector.suspect(nodes)
        self._core.hot.shrink()

    # The last step

    async def _finish(self, commit: Commit, agent: Agent | None, plan: Plan, effort: Effort, began: float) -> Committed:
        core = self._core
        if effort.refusal is not None:
            self._bear(commit, effort.refusal)
        before = _State.of(agent)
        agent = self._apply_to_index(commit, agent, plan)
        for node in before.all_nodes():
            node.pins += 1
        try:
            outcome = await self._write_down(commit, agent, before, plan, effort)
        finally:
            self._let_go(before.all_nodes())
            gone = core.index.agents.get(agent.key) is not agent
            if gone:
                self.forget(agent)
        if gone:
            raise AgentDeleted(f"agent {commit.agent_id!r} was deleted while the request ran")
        if outcome is not None:
            owed_by = None if agent.durable else agent
            core.outcomes[commit.tenant, outcome.request_id] = KeptOutcome(outcome, agent.last_used, owed_by)
        return Committed(core.record(agent), agent.durable, time.perf_counter() - began, effort.bytes_written)

    async def _write_down(
        self, commit: Commit, agent: Agent, before: _State, plan: Plan, effort: Effort
    ) -> RequestOutcome | None:
        """Have the journal take the agent as it is now; if it can't, take note that only RAM has it."""
        agent.durable = effort.refusal is None
        try:
            if agent.durable:
                outcome = self._outcome(commit, agent, persisted=True)
                statements = self._statements(agent, before, plan)
                if outcome is not None:
                    statements.append(rows.insert_outcome(commit.tenant, outcome, agent.last_used))
                if await self._apply(agent, statements, plan.all_nodes(), before.all_nodes()):
                    return outcome
        except Exception:
            # Nobody foresaw this, so nobody knows what the journal has: it is written whole, soon.
            self._note_not_durable(agent, before)
            raise
        self._note_not_durable(agent, before)
        return self._outcome(commit, agent, persisted=False)

    def _bear(self, commit: Commit, refusal: OSError) -> None:
        """Go on in RAM, if it has room."""
        hot = self._core.hot
        if hot.unsaved_bytes > hot.limit:
            raise MemoryBudget(
                "the disk refuses writes, and what it refused before fills the memory budget; free disk space",
                retry_after=self._core.settings.retry_seconds,
            )
        log.warning("the last commit of agent %r stays in RAM: %s", commit.agent_id, refusal)

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

    def _apply_to_index(self, commit: Commit, agent: Agent | None, plan: Plan) -> Agent:
        index = self._core.index
        now = time.time()
        changed = agent is None or not np.array_equal(agent.tokens, commit.tokens)
        if agent is None:
            agent = Agent(commit.tenant, commit.agent_id, index.new_incarnation(), self._core.fingerprint)
            agent.create_time, agent.revision = now, 0
            index.add_agent(agent)
        index.replace_nodes(agent, plan.nodes, plan.snapshots, plan.windowed)
        for node in agent.all_nodes():
            node.last_used = now
        for node in reversed(agent.nodes):
            self._core.hot.touch(node)
        if changed:
            agent.tokens = commit.tokens.astype(np.int32)
            agent.tokens.flags.writeable = False
            agent.revision += 1
        agent.fingerprint = self._core.fingerprint
        agent.kept, agent.previous, agent.ending, agent.last_used = plan.kept, plan.previous, commit.ending, now
        if not isinstance(commit.pinned, Unset) and commit.pinned != agent.pinned:
            index.set_pinned(agent, commit.pinned)
            changed = True
        if not isinstance(commit.ttl, Unset) and commit.ttl != agent.ttl:
            agent.ttl = commit.ttl
            changed = True
        if not isinstance(commit.labels, Unset) and commit.labels != agent.labels:
            agent.labels = dict(commit.labels)
            changed = True
        if changed:
            agent.update_time = now
        return agent

    def _outcome(self, commit: Commit, agent: Agent, *, persisted: bool) -> RequestOutcome | None:
        if commit.request is None or isinstance(commit.request, RequestOutcome):
            return commit.request
        return commit.request(self._core.record(agent), persisted)

    async def _apply(
        self, agent: Agent, statements: list[Statement], nodes: Iterable[Node], replaced: Iterable[Node]
    ) -> bool:
        """One transaction, with the outcomes of earlier commits that the journal doesn't have.

        Args:
            replaced: what the agent referenced before.
        """
        outcomes = self._core.outcomes.items() if agent in self.not_durable else ()
        owed = [(tenant, kept) for (tenant, _), kept in outcomes if kept.owed_by is agent]
        statements += [rows.insert_outcome(tenant, kept.outcome, kept.time) for tenant, kept in owed]
        dirty = [node for node in nodes if node.dirty]
        for node in dirty:
            node.dirty = False  # Now, not afterwards: what changes meanwhile is for the next commit to write.
        try:
            await self._core.journal.apply(statements, lives(agent))
        except BaseException as error:
            for node in dirty:
                node.dirty = True
            if not isinstance(error, OSError):
                raise
            log.warning("the last commit of agent %r stays in RAM: %s", agent.agent_id, error)
            return False
        for node in nodes:
            node.saved = True
        for _, kept in owed:
            kept.owed_by = None
        agent.saved = agent.durable = True
        self._manifests.note(agent, [*replaced, *self.not_durable.get(agent, [])])
        self.forget(agent)
        return True


def _check(commit: Commit) -> None:
    reused = commit.reuse.length
    grown = commit.growth.count if commit.growth is not None else 0
    if reused + grown != len(commit.tokens) or (commit.growth is not None and commit.growth.start != reused):
        raise ValueError(f"{reused} reused and {grown} computed tokens don't make a context of {len(commit.tokens)}")
    if not np.array_equal(commit.tokens[:reused], commit.lease.tokens[:reused]):
        raise ValueError("the reused KV is of other tokens")
