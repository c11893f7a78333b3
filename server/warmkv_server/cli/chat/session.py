"""Questions and answers with one agent, also across a restart of the server."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, Self

from warmkv_server.cli import reports
from warmkv_server.cli.chat.own_server import OwnServer
from warmkv_server.cli.chat.screen import Screen
from warmkv_server.cli.chat.tools import NO_TOOLS, Toolbox
from warmkv_server.cli.connection import sentence

if TYPE_CHECKING:
    from warmkv import v1
    from warmkv.client import Answer, Client, Stream, WarmKVError

PATIENCE = 300.0
"""Seconds for a server to come back: loading a large model takes minutes."""
MOST_ROUNDS = 100
"""Answers in a row that call tools: a model that never ends would go on for ever."""
_TRIES = 3
_WORDS = {"user": "question isn't", "tool": "results of the calls aren't"}


class Lost(Exception):
    """A call that failed, in a sentence."""


class ChatSession:
    """
    Args:
        own: the server, if the chat has started it.
        max_tokens: of an answer; 0 for the server's default.
        interactive: Ctrl-C ends an answer, and not the program.
        tools: that the agent may call.

    Attributes:
        agent: whose turn it is; commands change it.
        said: the messages that were said here, in order, as chat templates take them.
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
        tools: Toolbox = NO_TOOLS,
    ) -> None:
        self.client = client
        self.agent = agent
        self.screen = screen
        self.said: list[dict[str, Any]] = []
        self._own = own
        self._max_tokens = max_tokens
        self._interactive = interactive
        self._tools = tools

    def content(self, *messages: tuple[str, str]) -> v1.Content:
        """What begins a conversation, or a question in one: roles and texts, with the tools."""
        from warmkv.client import chat

        content = chat(*messages)
        self._tools.put_into(content)
        return content

    def ask(self, question: str) -> bool:
        """Show the answer as it comes; where it calls tools, call them, and show what is made of the results.

        Returns whether there was an answer.
        """
        from warmkv import v1

        content, asked = self.content(("user", question)), [{"role": "user", "content": question}]
        for _ in range(MOST_ROUNDS):
            answer = self._answer(content, asked)
            if answer is None:
                return False
            finished = answer.finished
            if finished.finish_reason != v1.FINISH_REASON_TOOL_CALLS:
                if finished.tool_calls:
                    self.screen.note("the answer ended inside its calls: none is done; more --max-tokens would help")
                return True
            results = self._tools.results(finished.tool_calls, self.screen)
            content = v1.Content(chat=v1.ChatMessages(messages=results))
            asked = [
                {"role": each.role, "tool_call_id": each.tool_call_id, "content": each.content} for each in results
            ]
        self.screen.note(f"it has called tools {MOST_ROUNDS} times in a row; the last results aren't sent")
        return True

    def _answer(self, content: v1.Content, asked: list[dict[str, Any]]) -> Answer | None:
        """Show the answer as it comes. Returns what came of it; None if there was none.

        A server that goes away is waited for, and asked again: the request has an id, so nothing is done twice.
        """
        from warmkv.client import WarmKVError
        from warmkv.client.content import generation

        request = generation(self.agent, content, {"max_tokens": self._max_tokens})
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
                    self._keep(asked, stream.answer)
                    self.screen.note(reports.answered(stream.answer.finished))
                    return stream.answer
                if interrupts.came:
                    self._stopped(asked, stream.answer)
                    return stream.answer
            shown = max(shown, stream.answer.text, key=len)
            if not error.is_unavailable:
                raise self.lost(error) from None
            if not self._back():
                return None
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
        if error.reason == "TOOLS_CHANGED":
            return Lost(
                f"agent {self.agent} has other tools than --tools gives now; /delete begins it anew, and /agent ID "
                "goes to another"
            )
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

    def _keep(self, asked: list[dict[str, Any]], answer: Answer) -> None:
        said: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if calls := [each.call for each in answer.finished.tool_calls]:
            said["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
                for call in calls
            ]
        self.said += [*asked, said]

    def _stopped(self, asked: list[dict[str, Any]], answer: Answer) -> None:
        if answer.token_ids:
            self._keep(asked, answer)
            self.screen.note("stopped; what came is kept")
        else:
            self.screen.note(f"stopped before the answer began; the {_WORDS[str(asked[0]['role'])]} kept")


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
