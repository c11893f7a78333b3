"""Hidden agents: contexts of requests that named no agent, kept for whoever goes on with them.

They are agents like others, but for their name, which nobody outside can say, and for what they may take: they go
before others do, in RAM as on disk.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from warmkv_server.kv.index.index import Agent, Node

_AGENT_BYTES = 1024
_TOKEN_BYTES = 4
"""What the index has of an agent, about, and of each of its tokens."""


class HiddenAgents:
    """Used on the event loop's thread.

    Attributes:
        nbytes: of the block files that hidden agents alone reference, and of what the index has of these agents, by
            tenant. `Accounts` changes the part of the files.
    """

    def __init__(self) -> None:
        self.nbytes: Counter[str] = Counter()
        self._lines: defaultdict[str, dict[Agent, None]] = defaultdict(dict)
        self._ending: defaultdict[Node, set[Agent]] = defaultdict(set)

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def add(self, agent: Agent) -> None:
        self._lines[agent.tenant][agent] = None
        self.nbytes[agent.tenant] += _index_bytes(agent)
        if agent.nodes:
            self._ending[agent.nodes[-1]].add(agent)

    def remove(self, agent: Agent) -> None:
        line = self._lines[agent.tenant]
        del line[agent]
        if not line:
            del self._lines[agent.tenant]
        self.nbytes[agent.tenant] -= _index_bytes(agent)
        if agent.nodes:
            ending = self._ending[agent.nodes[-1]]
            ending.remove(agent)
            if not ending:
                del self._ending[agent.nodes[-1]]

    def ending_with(self, node: Node) -> list[Agent]:
        """Those whose context ends where this node does."""
        return list(self._ending.get(node, ()))

    def oldest_of_richest(self) -> Agent | None:
        """The one that goes first: of the tenant that has most, the one that was committed first."""
        tenant = max(self._lines, key=lambda each: self.nbytes[each], default=None)
        return None if tenant is None else next(iter(self._lines[tenant]))

    def by_last_use(self) -> list[Agent]:
        """All of them, and from now on they go in this order."""
        agents = sorted((each for line in self._lines.values() for each in line), key=lambda each: each.last_used)
        self._lines.clear()
        for agent in agents:
            self._lines[agent.tenant][agent] = None
        return agents


def _index_bytes(agent: Agent) -> int:
    return _AGENT_BYTES + _TOKEN_BYTES * len(agent.tokens)
