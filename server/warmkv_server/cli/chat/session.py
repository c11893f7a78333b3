"""Questions and answers with one agent, also across a restart of the server."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, Self

from warmkv_server.cli import reports
from warmkv_server.cli.chat.own_server import OwnServer
from warmkv_server.cli.chat.screen import Screen
from warmkv_server.cli.connection import sentence

if TYPE_CHECKING:
    from warmkv import v1
    from warmkv.client import Client, Stream, WarmKVError

PATIENCE = 300.0
"""Seconds for a server to come back: loading a large model takes minutes."""
_TRIES = 3


class Lost(Exception):
    """A call that failed, in a sentence."""


class ChatSession:
    """
    Args:
        own: the server, if the chat has started it.
        max_tokens: of an answer; 0 for the server's default.
        interactive: Ctrl-C ends an answer, and not the program.

    Attributes:
        agent: whose turn it is; commands change it.
        said: role and text of what was said here, in order.
    """

    def __init__(
        self,
        client: Client,
        agent: str,
        screen: Screen,
        own: OwnServer | None,
        *,
        max_tokens: int,
        interactive: bool,
    ) -> None:
        self.client = client
        self.agent = agent
        self.screen = screen
        self.said: list[tuple[str, str]] = []
        self._own = own
        self._max_tokens = max_tokens
        self._interactive = interactive

    def ask(self, question: str) -> bool:
        """Show the answer as it comes. Returns whether there was one.

        A server that goes away is waited for, and asked again: the request has an id, so nothing is done twice.
        """
        from warmkv.client import WarmKVError
        from warmkv.client.content import generation

        request = generation(self.agent, question, {"max_tokens": self._max_tokens})
        shown = ""
        for _ in range(_TRIES):
            with _Interrupts(self._interactive) as interrupts:
                stream = self.client.send(request)
                interrupts.end(stream)
                try:
                    with self.screen.answer(shown) as screen:
                        for event in stream.events():
                            screen.follow(event)
                except WarmKVError as failed:
                    error = failed
                else:
                    self._done(question, stream)
                    return True
                if interrupts.came:
                    self._stopped(question, stream)
                    return True
            shown = max(shown, stream.answer.text, key=len)
            if not error.is_unavailable:
                raise self.lost(error) from None
            if not self._back():
                return False
        raise Lost(f"the server went away {_TRIES} times while it was asked; it isn't asked again")

    def known(self) -> v1.Agent | None:
        """The agent as it is now; None if there is none yet."""
        from warmkv.client import WarmKVError

        try:
            found = self.client.get(self.agent)
            return found if found.revision else None  # else somebody's Prime makes it
        except WarmKVError as error:
            if error.reason == "AGENT_NOT_FOUND":
                return None
            raise self.lost(error) from None

    def lost(self, error: WarmKVError) -> Lost:
        return Lost(sentence(self.client.target, error))

    def _back(self) -> bool:
        """Wait for the server; whether it is back before Ctrl-C."""
        from warmkv.client import WarmKVError

        self.screen.note(f"the server at {self.client.target} went away; waiting for it (Ctrl-C gives up)")
        try:
            if self._own is not None:
                self._own.ensure()
            self.client.wait_until_ready(PATIENCE)
        except KeyboardInterrupt:
            self.screen.note("not asked again")
            return False
        except WarmKVError as error:
            raise self.lost(error) from None
        return True

    def _done(self, question: str, stream: Stream) -> None:
        self.said += [("user", question), ("assistant", stream.answer.text)]
        self.screen.note(reports.answered(stream.answer.finished))

    def _stopped(self, question: str, stream: Stream) -> None:
        if stream.answer.token_ids:
            self.said += [("user", question), ("assistant", stream.answer.text)]
            self.screen.note("stopped; what came is kept")
        else:
            self.screen.note("stopped before the answer began; the question isn't kept")


class _Interrupts:
    """Has Ctrl-C cancel an answer, for the block. Raises nothing, for gRPC could be anywhere when it comes.

    Attributes:
        came: whether there was one.
    """

    def __init__(self, wanted: bool) -> None:
        self.came = False
        self._wanted = wanted
        self._stream: Stream | None = None
        self._before: Any = None

    def __enter__(self) -> Self:
        if self._wanted:
            self._before = signal.signal(signal.SIGINT, lambda *_: self._press())
        return self

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            signal.signal(signal.SIGINT, self._before)

    def end(self, stream: Stream) -> None:
        """Have it end this one."""
        self._stream = stream
        if self.came:
            stream.cancel()

    def _press(self) -> None:
        self.came = True
        if self._stream is not None:
            self._stream.cancel()
