"""The tools of a chat: what the server is told of them, and what comes of an agent's calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from warmkv_server.cli.chat.screen import Screen
from warmkv_server.offline.words import printable

if TYPE_CHECKING:
    from warmkv import v1
    from warmkv_server.cli.chat.functions import Function

_SHOWN = 300
"""Characters of a call or of a result on the screen."""


def ask(question: str) -> bool:
    """Whether somebody at the terminal says yes."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        print()
        return False


class Toolbox:
    """
    Args:
        allowed: asked before each call, with a question for people.
    """

    def __init__(self, functions: Mapping[str, Function], allowed: Callable[[str], bool]) -> None:
        self._functions = functions
        self._allowed = allowed

    def put_into(self, content: v1.Content) -> None:
        """Say what there is to call, if there is anything. The same again is no change for an agent."""
        if self._functions:
            content.chat.tools.tools.extend(_told(each) for each in self._functions.values())

    def results(self, calls: Iterable[v1.ToolCallFinished], screen: Screen) -> list[v1.ChatMessage]:
        """Call what may be called. Every call gets a result, also one that can't be done: the model can mend it."""
        from warmkv import v1

        results = []
        for each in calls:
            said = self._result(each, screen)
            screen.note(f"  {_line(said)}")
            results.append(v1.ChatMessage(role="tool", tool_call_id=each.call.id, content=said))
        return results

    def _result(self, finished: v1.ToolCallFinished, screen: Screen) -> str:
        from warmkv import v1

        call = finished.call
        screen.note(_line(f"{call.name}({_arguments(call.arguments_json)})" if call.name else finished.raw))
        function = self._functions.get(call.name)
        if finished.status in (v1.TOOL_CALL_STATUS_MALFORMED, v1.TOOL_CALL_STATUS_INCOMPLETE):
            return "error: this is no call that can be read"
        if function is None:
            return f"error: there is no tool {call.name}; there are {', '.join(self._functions)}"
        if finished.status != v1.TOOL_CALL_STATUS_VALID:
            return f"error: the arguments are not of this schema: {json.dumps(function.parameters)}"
        if not self._allowed("do it? [y/N] "):
            return "error: the user doesn't allow this call"
        return function.call(call.arguments_json)


NO_TOOLS = Toolbox({}, ask)


def _told(function: Function) -> v1.Tool:
    from warmkv import v1

    parameters = json.dumps(function.parameters, ensure_ascii=False)
    return v1.Tool(name=function.name, description=function.description, parameters_json=parameters)


def _arguments(told: str) -> str:
    """As Python would have them; as they are where they are no object."""
    try:
        return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in json.loads(told).items())
    except (ValueError, AttributeError, RecursionError):
        return told


def _line(text: str) -> str:
    """On one line, without orders to the terminal."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"
