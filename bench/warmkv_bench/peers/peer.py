"""What a peer has to be able to do. An adapter for another server is a class with these four methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class PeerFailed(Exception):
    """A peer did not start, did not answer, or answered something else than was asked for."""


@dataclass(slots=True)
class Completion:
    """One streamed answer. Times are milliseconds since just before the request was sent.

    Attributes:
        piece_times_ms: when each piece of the answer arrived. A piece is a token, or several that were held back.
        prompt_tokens, output_tokens: the peer's own counts.
        cached_tokens: what it says it reused of the prompt; None if it does not say.
    """

    piece_times_ms: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None


class Peer(Protocol):
    """A server, or a program, that answers prompts. It is started with nothing cached."""

    name: str

    async def start(self) -> None:
        """Starts it and returns when it answers; raises PeerFailed."""

    async def stop(self) -> None:
        """Ends it, in order, so that what it keeps on disk is kept. Does nothing if it does not run."""

    async def ask(self, session: str, prompt: str, output_tokens: int) -> Completion:
        """Streams a greedy answer of exactly `output_tokens`; raises PeerFailed.

        Args:
            session: names the conversation, for a peer that wants to know. The prompt is always the whole text.
        """

    async def close(self) -> None:
        """Stops it for good and removes what it kept."""
