"""Changes of agents that compute nothing: fork, options, delete. Durable before they return; what the disk refuses, and
what breaks, has not happened.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from warmkv_server.errors import AgentDeleted, AgentExists, StorageUnavailable
from warmkv_server.kv import rows
from warmkv_server.kv.collect import Collector
from warmkv_server.kv.commit import Committer
from warmkv_server.kv.commit_log import dies, lives
from warmkv_server.kv.core import Core, KeptOutcome
from warmkv_server.kv.index import Agent
from warmkv_server.kv.manifests import Manifests
from warmkv_server.kv.records import AgentRecord, OutcomeOf, RequestOutcome, Unset


class Changes:
    """Used on the event loop's thread. Its calls are not to be cancelled."""

    def __init__(
        self,
        core: Core,
        committer: Committer,
        collector: Collector,
        manifests: Manifests,
        changed: Callable[[], object],
    ) -> None:
        """
        Args:
            changed: is called when there are other lifetimes to keep.
        """
        self._core = core
        self._committer = committer
        self._collector = collector
        self._manifests = manifests
        self._changed = changed

    async def fork(
        self, tenant: str, source_id: str, target_id: str, request: RequestOutcome | OutcomeOf | None
    ) -> AgentRecord:
        """See `Store.fork`."""
        core = self._core
        source = core.existing(tenant, source_id)
        target = (tenant, target_id)
        if target in core.index.agents or target in self._committer.tickets:
            raise AgentExists(f"agent {target_id!r} exists already; fork to another id, or delete it first")
        if not source.durable:
            raise StorageUnavailable(
                f"the last commit of agent {source_id!r} is not on disk yet", retry_after=core.settings.retry_seconds
            )
        agent = _copy(source, target_id, core.index.new_incarnation())
        core.index.add_agent(agent)
        nodes = list(agent.all_nodes())

        def undo() -> None:
            if core.index.agents.get(agent.key) is agent:
                core.index.remove_agent(agent)
            self._collector.suspect(nodes)

        with self._or(undo, "the disk doesn't take the fork"):
            outcome = request(core.record(agent), True) if callable(request) else request
            statements = [rows.put_node(node) for node in nodes if node.dirty or not node.saved]
            statements += rows.insert_agent(agent)
            if outcome is not None:
                statements.append(rows.insert_outcome(tenant, outcome, agent.create_time))
            await core.journal.apply(statements, lives(agent))
        agent.saved = True
        if core.index.agents.get(agent.key) is not agent:
            raise AgentDeleted(f"agent {target_id!r} was deleted while it was made")
        self._manifests.note(agent)
        if outcome is not None:
            core.outcomes[tenant, outcome.request_id] = KeptOutcome(outcome, agent.create_time)
        self._changed()
        return core.record(agent)

    async def update(
        self,
        tenant: str,
        agent_id: str,
        pinned: bool | Unset,
        ttl: float | Unset | None,
        labels: Mapping[str, str] | Unset,
    ) -> AgentRecord:
        """See `Store.update`."""
        core = self._core
        agent = core.existing(tenant, agent_id)
        before = agent.pinned, agent.ttl, agent.labels, agent.update_time

        def undo() -> None:
            core.index.set_pinned(agent, before[0])
            _, agent.ttl, agent.labels, agent.update_time = before

        with self._or(undo, "the disk doesn't take the change"):
            if not isinstance(pinned, Unset):
                core.index.set_pinned(agent, pinned)
            if not isinstance(ttl, Unset):
                agent.ttl = ttl
            if not isinstance(labels, Unset):
                agent.labels = dict(labels)
            if (agent.pinned, agent.ttl, agent.labels) != before[:3]:
                agent.update_time = time.time()
            if not agent.saved:
                raise OSError("the agent is not on disk yet")
            columns = {**rows.option_columns(agent), "update_time": agent.update_time}
            record = lives(agent) if agent.durable else None  # What only RAM has is in no manifest.
            await core.journal.apply([rows.update_columns(agent.incarnation, columns)], record)
        self._manifests.note(agent)
        self._changed()
        return core.record(agent)

    async def delete(self, tenant: str, agent_id: str) -> bool:
        """See `Store.delete`."""
        core = self._core
        key = tenant, agent_id
        ticket = self._committer.tickets.get(key)
        if ticket is not None:
            ticket.deleted = True
        agent = core.index.agents.get(key)
        if agent is None:
            return ticket is not None
        agent.deleting = True

        def undo() -> None:
            agent.deleting = False
            self._manifests.note(agent)

        with self._or(undo, "the disk doesn't take the deletion; the agent is still there"):
            if agent.saved or agent.durable or ticket is not None:
                await self._manifests.remove(agent)
                await core.journal.remove([*rows.delete_agent(agent.incarnation)], dies(agent))
        if core.index.agents.get(key) is agent:
            core.index.remove_agent(agent)
            core.was_hot.discard(agent)
            self._committer.forget(agent)
            self._collector.suspect(agent.all_nodes())
        return True

    @contextlib.contextmanager
    def _or(self, undo: Callable[[], None], refusal: str) -> Iterator[None]:
        """Undo what the block has changed in RAM, if it raises.

        Raises:
            StorageUnavailable: for an OSError.
        """
        try:
            yield
        except BaseException as error:
            undo()
            if isinstance(error, OSError):
                raise StorageUnavailable(refusal, retry_after=self._core.settings.retry_seconds) from error
            raise


def _copy(source: Agent, agent_id: str, incarnation: int) -> Agent:
    """A new agent with the context of another."""
    now = time.time()
    head = len(source.tokens)
    agent = Agent(source.tenant, agent_id, incarnation, source.fingerprint, tokens=source.tokens)
    agent.nodes, agent.snapshots = list(source.nodes), dict(source.snapshots)
    agent.windowed = set(source.windowed)
    agent.kept, agent.previous = tuple(sorted({*source.kept, head} - {0})), source.previous
    agent.ttl, agent.labels, agent.ending = source.ttl, dict(source.labels), source.ending
    agent.create_time = agent.update_time = agent.last_used = now
    agent.parent_agent_id = source.agent_id
    agent.durable = True
    return agent
