"""Calls as DeepSeek V3.2 and V4 write them: a tag for each, and in it one for each argument that says if it is text."""

from __future__ import annotations

import json
import re
from typing import Any

_CALL = re.compile(r'<｜DSML｜invoke name="([^"]+)">(.*?)</｜DSML｜invoke>', re.DOTALL)
_ARGUMENT = re.compile(r'<｜DSML｜parameter name="([^"]+)" string="(true|false)">(.*?)</｜DSML｜parameter>', re.DOTALL)


def parse_tool_call(inside: str, _: Any = None) -> list[dict[str, str]]:
    """The calls of a block, each a name and its arguments as JSON. What is no text is JSON as the model wrote it.

    Raises:
        ValueError: there is something else between them, or an argument that is neither.
    """
    calls = []
    for name, body in _parts(_CALL, inside):
        members = []
        for key, is_text, value in _parts(_ARGUMENT, body):
            if is_text == "false":
                json.loads(value)
            told = json.dumps(value, ensure_ascii=False) if is_text == "true" else value.strip()
            members.append(f"{json.dumps(key, ensure_ascii=False)}: {told}")
        calls.append({"name": name, "arguments": f"{{{', '.join(members)}}}"})
    return calls


def _parts(pattern: re.Pattern[str], text: str) -> list[tuple[str, ...]]:
    """What the pattern finds, with nothing but white space around."""
    if rest := pattern.sub("", text).strip():
        raise ValueError(f"{rest[:40]!r} is not of the format")
    return [match.groups() for match in pattern.finditer(text)]
