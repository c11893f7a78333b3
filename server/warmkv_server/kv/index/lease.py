"""What a request holds on to while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from warmkv_server.contract.kv import Fallback
from warmkv_server.kv.index.records import TokenIds

if TYPE_CHECKING:
    from warmkv_server.kv.index.index import Agent, Node


@dataclass
class Lease:
    """The nodes that cover the longest usable prefix of a requested context, kept from collection until released.

    Attributes:
        tokens: the requested context, whole.
        incarnation: of the agent, or None if it doesn't exist.
        length: tokens promised. `Store.load` may shorten it.
        nodes: in order; they cover [0, length), and the last may reach beyond.
        own_nodes: how many of them, from the first, are in the agent's own context.
        snapshot: the node with the recurrent state after `length` tokens, for models that have one.
        extra_key: what the context's KV is a function of besides the tokens and the fingerprint.
        fallback: why it is shorter than what the agent's own context has in common with the request, if it is.
    """

    tenant: str
    agent_id: str
    tokens: TokenIds
    incarnation: int | None
    length: int = 0
    nodes: list[Node] = field(default_factory=list)
    own_nodes: int = 0
    snapshot: Node | None = None
    fallback: Fallback | None = None
    extra_key: bytes = b""
    on_release: Callable[[Iterable[Node]], None] | None = None
    _pinned: list[Node] = field(default_factory=list)
    _agent: Agent | None = None

    def hold(self, agent: Agent) -> None:
        """Keep the agent from expiring until the lease is released."""
        agent.leases += 1
        self._agent = agent

    def pin(self, *nodes: Node) -> None:
        """Keep these from collection until the lease is released."""
        for node in nodes:
            node.pins += 1
        self._pinned += nodes

    def release(self) -> None:
        """Let go. Doing so twice is harmless."""
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.leases -= 1
        pinned, self._pinned = self._pinned, []
        for node in pinned:
            node.pins -= 1
        if pinned and self.on_release is not None:
            self.on_release(pinned)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
