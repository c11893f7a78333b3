"""Changes of agents that compute nothing: fork, options, delete. Durable before they return; what the disk refuses, and
what breaks, has not happened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from warmkv_server.contract.names import AgentKey
from warmkv_server.contract.store import AgentRecord
from warmkv_server.errors import AgentExists, StorageUnavailable
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.catalog.commit_log import dies, lives
from warmkv_server.kv.catalog.stored_outcomes import KeptOutcome
from warmkv_server.kv.index.index import Agent
from warmkv_server.kv.index.records import OutcomeOf, RequestOutcome, Unset
from warmkv_server.kv.tasks.collect import Collector
from warmkv_server.kv.tasks.commit import Committer
from warmkv_server.kv.tasks.core import Core
from warmkv_server.kv.tasks.manifests import Manifests


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
        target = AgentKey(tenant, target_id)
        if target in core.index.agents or target in self._committer.tickets:
            raise AgentExists(
                f"agent {target_id!r} exists already; fork to another id, or delete it first", agent_id=target_id
            )
        if not source.durable:
            raise StorageUnavailable(
                f"the last commit of agent {source_id!r} is not on disk yet",
                retry_after=core.tuning.retry_seconds,
                agent_id=source_id,
            )
        agent = _copy(source, target_id, core.index.new_incarnation(), core.clock.now())
        nodes = list(agent.all_nodes())
        made = core.clock.awake()
        async with self._committer.working_on(target, nodes), core.last_step(target):
            outcome = request(core.record(core.accounts.sized(agent)), True) if callable(request) else request
            statements = [rows.put_node(node) for node in nodes if node.dirty or not node.saved]
            statements += rows.insert_agent(agent)
            if outcome is not None:
                statements.append(rows.insert_outcome(tenant, outcome, made))
            with self._or(_nothing, "the disk doesn't take the fork"):
                await core.journal.apply(statements, lives(agent))
            agent.saved = True
            core.accounts.add(agent)
            self._manifests.note(agent)
            if outcome is not None:
                core.outcomes.add(KeptOutcome(tenant, outcome, made))
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
        key = AgentKey(tenant, agent_id)
        if key not in core.index.agents:
            await self._committer.idle(key)  # It may be about to be there.
        async with core.last_step(key):
            agent = core.existing(tenant, agent_id)
            if not agent.saved:
                raise StorageUnavailable(
                    f"agent {agent_id!r} is in RAM only, because the disk refused it; free disk space, and it is "
                    "written by itself",
                    retry_after=core.tuning.retry_seconds,
                    agent_id=agent_id,
                )
            after = replace(agent)
            if not isinstance(pinned, Unset):
                after.pinned = pinned
            if not isinstance(ttl, Unset):
                after.ttl = ttl
            if not isinstance(labels, Unset):
                after.labels = dict(labels)
            if (after.pinned, after.ttl, after.labels) != (agent.pinned, agent.ttl, agent.labels):
                after.update_time = core.clock.now()
            columns = {**rows.option_columns(after), "update_time": after.update_time}
            with self._or(_nothing, "the disk doesn't take the change"):
                record = lives(after) if agent.durable else None  # What only RAM has is in no manifest.
                await core.journal.apply([rows.update_columns(agent.incarnation, columns)], record)
            core.index.set_pinned(agent, after.pinned)
            agent.ttl, agent.labels, agent.update_time = after.ttl, after.labels, after.update_time
            self._manifests.note(agent)
        self._changed()
        return core.record(agent)

    async def delete(self, tenant: str, agent_id: str) -> bool:
        """See `Store.delete`. What is at work on the agent is not touched unless the agent is gone."""
        core = self._core
        key = AgentKey(tenant, agent_id)
        async with core.last_step(key):
            agent = core.index.agents.get(key)
            if agent is None:
                ticket = self._committer.tickets.get(key)
                if ticket is not None:
                    ticket.deleted = True
                return ticket is not None
            agent.deleting = True

            def undo() -> None:
                agent.deleting = False
                self._manifests.note(agent)

            with self._or(undo, "the disk doesn't take the deletion; the agent is still there"):
                if agent.saved or agent.durable:
                    await self._manifests.remove(agent)
                    await core.journal.remove([*rows.delete_agent(agent.incarnation)], dies(agent))
            core.accounts.remove(agent)
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
                raise StorageUnavailable(refusal, retry_after=self._core.tuning.retry_seconds) from error
            raise


def _copy(source: Agent, agent_id: str, incarnation: int, now: float) -> Agent:
    """A new agent with the context of another."""
    head = len(source.tokens)
    agent = Agent(source.tenant, agent_id, incarnation, source.fingerprint, tokens=source.tokens)
    agent.nodes, agent.snapshots = list(source.nodes), dict(source.snapshots)
    agent.partial = set(source.partial)
    agent.kept, agent.previous = tuple(sorted({*source.kept, head} - {0})), source.previous
    agent.ttl, agent.labels, agent.ending = source.ttl, dict(source.labels), source.ending
    agent.create_time = agent.update_time = agent.last_used = now
    agent.parent_agent_id = source.agent_id
    agent.durable = True
    return agent


def _nothing() -> None:
    """Undoes nothing."""
