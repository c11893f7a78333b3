"""What a request holds on to while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from warmkv_server.kv.records import TokenIds
from warmkv_server.kv.types import Fallback

if TYPE_CHECKING:
    from warmkv_server.kv.index import Node


@dataclass
class Lease:
    """The nodes that cover the longest usable prefix of a requested context, kept from collection until released.

    Attributes:
        length: tokens promised. `Store.load` may shorten it.
        incarnation: of the agent, or None if it doesn't exist.
        nodes: in order; they cover [0, length), and the last may reach beyond.
        snapshot: the node with the recurrent state after `length` tokens, for models that have one.
        own_length: tokens of the prefix that were in the agent's own context already.
        fallback: why the records promise less than one could expect.
    """

    tenant: str
    agent_id: str
    tokens: TokenIds
    incarnation: int | None
    length: int = 0
    nodes: list[Node] = field(default_factory=list)
    snapshot: Node | None = None
    own_length: int = 0
    fallback: Fallback | None = None
    on_release: Callable[[Lease], None] | None = None

    def release(self) -> None:
        """Let go. Doing so twice is harmless."""
        done, self.on_release = self.on_release, None
        if done is not None:
            done(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
