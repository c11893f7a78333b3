"""How a model writes calls, taken from what its chat template writes of some.

Calls whose names and arguments are known are looked for in what the template wrote; what is left around them is how the
model writes calls. So a call that is forced has every space where the model has learned it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from warmkv_server.contract.content import ToolCall
from warmkv_server.contract.grammar import ID, NUMBER, CallSyntax
from warmkv_server.text.formats import ToolFormat
from warmkv_server.text.json_scan import SPACE

_SECOND = re.compile(r"(?<=[\":])1(?=[\":<])")
"""The number of the second call, where calls are counted."""


def syntax_of(form: ToolFormat, calls: Sequence[ToolCall], one: str, both: str, thought: str) -> CallSyntax | None:
    """None where calls of this format can't be forced.

    Args:
        calls: two.
        one, both: what the template writes of the first of them, and of both; empty where it doesn't.
        thought: the mark behind reasoning; empty if there is none.
    """
    one, both = (text.rpartition(thought)[2] if thought else text for text in (one, both))
    if form.opened:
        return None  # a text begins in the same way
    if form.parser:
        return _unread(form, calls, one, both)
    found, further = _around(one, calls[:1]), _around(both, calls)
    if not found:
        return None
    opens, middle, closes = found
    again = middle_again = ""
    if further and [further[0], further[1], further[4]] == found:
        again, middle_again = (_SECOND.sub(NUMBER, text) for text in further[2:4])
    return CallSyntax(_begun(form, opens), middle, again, middle_again, closes.rstrip(SPACE))


def _unread(form: ToolFormat, calls: Sequence[ToolCall], one: str, both: str) -> CallSyntax | None:
    """Of calls that are no JSON: what ends the name is known, and the arguments are the model's."""
    opens, name, rest = one.partition(calls[0].name)
    opens = _begun(form, opens)
    inner = opens.partition(form.begins[0])[2].strip(SPACE)
    if not name or form.end not in rest or (inner and not inner.startswith("<")):
        return None  # what could be a further call couldn't be told from an argument
    between, second, _ = both.partition(form.end)[2].partition(calls[1].name)
    apart = between.removesuffix(opens) if second and between.endswith(opens) else "-"
    again = apart + opens if not apart.strip(SPACE) else ""
    # A mark may be a token of its own, which can't be begun.
    middle = "" if rest.startswith("<") else rest[:1]
    unread = rest[len(middle) : rest.find(form.end)]
    return CallSyntax(opens, middle, again, middle if again else "", form.end, unread, inner)


def _begun(form: ToolFormat, opens: str) -> str:
    """Without the white space that stands before a call."""
    return opens if opens.startswith(form.begins or ("{",)) else opens.lstrip(SPACE)


def _around(text: str, calls: Sequence[ToolCall]) -> list[str]:
    """What stands before, between and behind names and arguments, without ids; nothing if one of them isn't there."""
    parts = []
    for call in calls:
        before, _, text = text.partition(call.name)
        where = _value(text, call.arguments)
        if where is None:
            return []
        parts += [before, text[: where[0]]]
        text = text[where[1] :]
    parts.append(text)
    return [re.sub("|".join(re.escape(call.id) for call in calls), ID, part) for part in parts]


def _value(text: str, wanted: str) -> tuple[int, int] | None:
    """Where JSON of this value begins and ends."""
    for found in re.finditer(r"\{", text):
        try:
            value, end = json.JSONDecoder().raw_decode(text, found.start())
        except ValueError:
            continue
        if value == json.loads(wanted):
            return found.start(), end
    return None
