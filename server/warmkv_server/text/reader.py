"""An answer read as it grows: reasoning, text and tool calls told apart.

The reader is given the answer's text in pieces, cut anywhere, and tells of each part as soon as it is certain what it
is. What may be the beginning of a mark waits. The same text gives the same events, however it is cut, but for where the
pieces of one part are cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from warmkv_server.contract.calls import CallArguments, CallFinished, CallNews, CallStarted, CallStatus
from warmkv_server.contract.content import Tool, ToolCall
from warmkv_server.text.formats import PARSERS, ToolFormat, header_of
from warmkv_server.text.json_scan import SPACE, CallScan, ValueScan
from warmkv_server.text.render import tool_as_told

_HEADER = 4096
"""Characters of the longest header."""


@dataclass
class Pieces:
    """What became certain."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallNews] = field(default_factory=list)


class MessageReader:
    """
    Args:
        marks: around reasoning; None if the model has none.
        form: of the calls; None if there are no tools.
        ident: names the call of a number.
        thinks: whether the prompt has begun the reasoning.
        tools: for formats that need them to be read.
        around: marks that say nothing, where there is no format of calls.

    Attributes:
        finished: the calls so far that are over. Those that are whole count as valid.
    """

    def __init__(
        self,
        marks: tuple[str, str] | None,
        form: ToolFormat | None,
        ident: Callable[[int], str],
        *,
        thinks: bool = False,
        tools: Sequence[Tool] = (),
        around: Sequence[str] = (),
    ) -> None:
        self._marks = marks
        self._form = form
        self._ident = ident
        self._tools = tools
        self._silent = form.marks if form is not None else tuple(around)
        self._buffer = form.opened if form is not None and not thinks else ""
        self._opened = bool(self._buffer)
        """Whether the buffer begins with what the prompt has, and the answer hasn't."""
        self._gap = ""
        """White space before the last mark."""
        self._step: Callable[[bool], bool] = self._reasoning if thinks and marks else self._text
        self._bare = form is not None and not form.begins
        self._may_think = self._may_call = True
        self._trims, self._told_text = thinks, False
        self._raw = ""
        self._scan = CallScan()
        self._value = ValueScan()
        self._listed = self._started = False
        self._name = self._written = self._told = self._arguments = ""
        self._pieces = Pieces()
        self.finished: list[CallFinished] = []

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._step == self._reasoning

    @property
    def waits(self) -> bool:
        """Whether something waits for what follows it."""
        return bool(self._buffer)

    def push(self, text: str) -> Pieces:
        """What became certain with more of the answer."""
        self._buffer += text
        return self._go(final=False)

    def finish(self) -> Pieces:
        """What is left, once the answer is over."""
        return self._go(final=True)

    def _go(self, *, final: bool) -> Pieces:
        while self._step(final):
            pass
        pieces, self._pieces = self._pieces, Pieces()
        return pieces

    # Each step below takes what it can from the buffer, and says whether another may go on.

    def _text(self, final: bool) -> bool:
        if self._bare and self._may_call and self._begins_bare():
            return True
        if self._marks and self._may_think and (begun := self._begins_thought(self._marks[0], final)) is not None:
            return begun
        form, marks = self._form, self._silent
        at, mark = _first(self._buffer, marks)
        if mark and not final and _may_be_longer(self._buffer[at:], marks):
            return False
        if mark:
            before = self._buffer[:at].rstrip(SPACE)
            self._tell_text(before)
            self._gap = self._buffer[len(before) : at]
            self._buffer = self._buffer[at + len(mark) :]
            self._trims = True
            if form is not None and mark in form.begins:
                self._begin(mark)
            else:
                self._may_think = True
            return True
        held = 0 if final else _held(self._buffer, marks)
        self._tell_text(self._buffer[: len(self._buffer) - held])
        self._buffer = self._buffer[len(self._buffer) - held :]
        return False

    def _tell_text(self, text: str) -> None:
        if self._trims and not (self._told_text and text.strip(SPACE)):
            text = text.lstrip(SPACE)
        if not text:
            return
        self._trims, self._told_text = False, True
        if text.strip(SPACE):
            self._may_think = False
            self._may_call = self._may_call and not self._bare
        self._pieces.text += text

    def _begins_thought(self, mark: str, final: bool) -> bool | None:
        """Whether a step may follow, where reasoning begins or may begin; None where it doesn't."""
        stripped = self._buffer.lstrip(SPACE)
        if stripped.startswith(mark):
            self._buffer = stripped[len(mark) :]
            self._step, self._trims = self._reasoning, True
            return True
        return False if mark.startswith(stripped) and not final else None

    def _begins_bare(self) -> bool:
        """Whether the answer itself may be a call: then that is what comes."""
        stripped = self._buffer.lstrip(SPACE)
        if not stripped.startswith("{"):
            return False
        self._begin(self._buffer[: len(self._buffer) - len(stripped)])
        self._buffer = stripped
        return True

    def _reasoning(self, final: bool) -> bool:
        assert self._marks is not None
        end = self._marks[1]
        if self._trims:
            self._buffer = self._buffer.lstrip(SPACE)
        at = self._buffer.find(end)
        if at >= 0:
            self._pieces.reasoning += self._buffer[:at].rstrip(SPACE)
            self._buffer = self._buffer[at + len(end) :]
            self._step, self._trims, self._may_think = self._text, True, False
            return True
        held = 0 if final else _held(self._buffer, [end])
        told = self._buffer[: len(self._buffer) - held]
        self._pieces.reasoning += told
        self._trims = self._trims and not told
        self._buffer = self._buffer[len(told) :]
        return False

    def _begin(self, mark: str) -> None:
        """A call begins, or a list of them."""
        assert self._form is not None
        self._raw, self._listed = mark, False
        if self._opened:
            self._raw, self._opened = "", False
        self._begin_one()
        if self._form.parser:
            self._step = self._whole
        elif self._form.header:
            self._step = self._header
        else:
            self._step = self._before

    def _begin_one(self) -> None:
        keyed = self._form is not None and self._form.keyed
        self._scan, self._value, self._started = CallScan(keyed=keyed), ValueScan(), False
        self._name = self._written = self._arguments = ""

    def _before(self, final: bool) -> bool:
        """In front of an object, or of a list of them."""
        self._skip_space()
        if not self._buffer:
            return self._is_over(final)
        if self._buffer[0] == "[" and not self._listed:
            self._listed = True
            self._take(1)
            return True
        if self._buffer[0] == "{":
            self._step = self._object
            return True
        return self._break()

    def _object(self, final: bool) -> bool:
        end = self._scan.take(self._buffer, 0)
        self._take(end)
        scan = self._scan
        if scan.ready:
            self._start(scan.name, scan.id_when_ready)
            self._add(scan.fresh())
        elif self._bare and (scan.broken or scan.strange or scan.done):
            return self._is_text()
        if scan.broken or (scan.done and not scan.name):
            return self._break()
        if scan.done:
            self._start(scan.name, scan.id)
            self._add(scan.fresh())
            self._written = scan.id or self._written
            self._end_one(CallStatus.VALID)
            self._step = self._after
            return True
        return self._is_over(final)

    def _after(self, final: bool) -> bool:
        """Behind an object."""
        assert self._form is not None
        self._skip_space()
        if not self._buffer:
            if final:
                self._close()
            return False
        char, end = self._buffer[0], self._form.end
        follows = ("{", ",") if self._listed or end else (";",) if self._bare else ()
        if char in follows:
            if char != "{":
                self._take(1)
            self._raw = ""
            self._begin_one()
            self._step = self._before_next
            return True
        if char == "]" and self._listed:
            self._listed = False
            self._take(1)
            return True
        if end and self._buffer.startswith(end):
            self._buffer = self._buffer[len(end) :]
            self._close()
            return True
        if end and end.startswith(self._buffer):
            if final:
                self._take(len(self._buffer))
                self._close()
            return False
        if end:
            self._raw = ""
            self._begin_one()
            return self._break()
        self._close()
        return True

    def _before_next(self, final: bool) -> bool:
        """Behind a comma: another call, or nothing."""
        self._skip_space()
        if not self._buffer:
            if final:
                self._close()
            return False
        self._step = self._before if self._buffer[0] == "{" else self._after
        if self._step == self._after and self._buffer[0] in ",;":
            return self._break()
        return True

    def _header(self, final: bool) -> bool:
        form = self._form
        assert form is not None
        at = self._buffer.find(form.opens)
        found = header_of(form).fullmatch(self._buffer[:at]) if at >= 0 else None
        if form.opened:
            behind = self._buffer[at + len(form.opens) :].lstrip(SPACE) if found is not None else ""
            if found is not None and not behind and not final:
                return False
            if not behind.startswith("{") and (at >= 0 or final or len(self._buffer) > _HEADER):
                return self._is_no_call()
        if at < 0:
            if len(self._buffer) > _HEADER:
                return self._break()
            return self._is_over(final)
        if found is None:
            return self._break()
        self._take(at + len(form.opens))
        groups = found.groupdict()
        self._start(groups["name"], groups.get("id") or "")
        self._step = self._value_of
        return True

    def _value_of(self, final: bool) -> bool:
        """The arguments behind a header."""
        assert self._form is not None
        if not self._arguments:
            self._skip_space()
            if self._buffer and self._buffer[0] != "{":
                return self._break()
        end = self._value.take(self._buffer, 0)
        self._add(self._buffer[:end])
        self._take(end)
        if not self._value.done:
            return self._is_over(final)
        if not _is_object(self._arguments):
            return self._break()
        self._step = self._tail
        return True

    def _tail(self, final: bool) -> bool:
        """Behind the arguments that have a header before them."""
        form = self._form
        assert form is not None
        self._skip_space()
        if form.tail and self._buffer.startswith(form.tail):
            self._take(len(form.tail))
            self._skip_space()
        wanted = (form.end, form.tail) if form.tail else (form.end,)
        if form.end and not self._buffer.startswith(form.end):
            if not any(each.startswith(self._buffer) for each in wanted):
                return self._break()
            if not final:
                return False
        self._take(min(len(form.end), len(self._buffer)))
        self._end_one(CallStatus.VALID)
        self._close()
        return True

    def _whole(self, final: bool) -> bool:
        """A call that is read once all of it is there."""
        form = self._form
        assert form is not None
        at = self._buffer.find(form.end)
        if at < 0:
            return self._is_over(final)
        inside = self._buffer[:at]
        self._take(at + len(form.end))
        try:
            found = PARSERS[form.parser](inside, [tool_as_told(tool) for tool in self._tools])
            calls = [
                (str(each["name"]), _arguments_of(each)) for each in (found if isinstance(found, list) else [found])
            ]
        except Exception:  # whatever mlx-lm's parser raises of what isn't of its format
            calls = []
        if not calls:
            self._end_one(CallStatus.MALFORMED)
        for name, arguments in calls:
            self._begin_one()
            self._start(name, "")
            self._add(arguments)
            self._end_one(CallStatus.VALID)
        self._close()
        return True

    def _broken(self, final: bool) -> bool:
        """In what is not of the format, up to its end."""
        assert self._form is not None
        end = self._form.end
        at = self._buffer.find(end) if end else -1
        if at < 0:
            self._take(len(self._buffer) if final or not end else max(0, len(self._buffer) - len(end) + 1))
            if final:
                self._end_one(CallStatus.MALFORMED)
                self._close()
            return False
        self._take(at + len(end))
        self._end_one(CallStatus.MALFORMED)
        self._close()
        return True

    def _break(self) -> bool:
        self._step = self._broken
        return True

    def _is_text(self) -> bool:
        """What looked like a call is none."""
        self._buffer = self._raw + self._buffer
        self._step, self._trims, self._may_call = self._text, False, False
        return True

    def _is_no_call(self) -> bool:
        """The mark of one stands in a text."""
        self._step, self._trims = self._text, False
        self._tell_text(self._gap + self._raw)
        return True

    def _is_over(self, final: bool) -> bool:
        """Whether the answer has ended inside the call."""
        if not final:
            return False
        if self._bare and not self._started:
            return self._is_text()
        self._take(len(self._buffer))
        self._end_one(CallStatus.INCOMPLETE)
        self._close()
        return False

    def _close(self) -> None:
        self._step, self._trims, self._may_think = self._text, True, True

    def _take(self, count: int) -> None:
        self._raw += self._buffer[:count]
        self._buffer = self._buffer[count:]

    def _skip_space(self) -> None:
        self._take(len(self._buffer) - len(self._buffer.lstrip(SPACE)))

    def _start(self, name: str, written: str) -> None:
        if self._started:
            return
        self._started, self._name, self._written = True, name, written
        index = len(self.finished)
        self._told = written or self._ident(index)
        self._pieces.calls.append(CallStarted(index, self._told, name))

    def _add(self, arguments: str) -> None:
        if arguments:
            self._arguments += arguments
            self._pieces.calls.append(CallArguments(len(self.finished), arguments))

    def _end_one(self, status: CallStatus) -> None:
        self._start(self._name or self._scan.name, self._written)
        raw = self._raw if status is CallStatus.MALFORMED else ""
        call = ToolCall(self._told, self._name, self._arguments)
        self.finished.append(CallFinished(len(self.finished), call, status, raw, self._written))


def _first(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """Where the first mark stands, the longest of those that begin there; (-1, "") if none does."""
    found = [(text.find(mark), -len(mark), mark) for mark in marks if mark in text]
    at, _, mark = min(found, default=(-1, 0, ""))
    return at, mark


def _may_be_longer(text: str, marks: Sequence[str]) -> bool:
    """Whether what begins with a mark may become a longer one."""
    return any(len(mark) > len(text) and mark.startswith(text) for mark in marks)


def _held(text: str, marks: Sequence[str]) -> int:
    """How many of its last characters may be the beginning of a mark, with the white space before it."""
    if not marks:
        return 0
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    before = text[: len(text) - longest]
    return longest + len(before) - len(before.rstrip(SPACE))


def _arguments_of(call: Any) -> str:
    arguments = call.get("arguments", {})
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
