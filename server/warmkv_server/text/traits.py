"""What a chat template makes of tools, calls and reasoning: found out by having it write some, and reading them back.

A format of calls is the model's if what the template writes is read as it was meant. One that can't be read back is
none: a model whose calls would be read wrong is served without tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from warmkv_server.contract.content import ChatMessage, Setup, Tool, ToolCall
from warmkv_server.contract.grammar import CallSyntax
from warmkv_server.errors import InvalidField
from warmkv_server.text.formats import BY_NAME, FORMATS, REASONING, ToolFormat
from warmkv_server.text.reader import MessageReader
from warmkv_server.text.syntax import syntax_of
from warmkv_server.text.template import Refused, Template, mark

_TOOLS = (
    Tool("warmkv_first", "The first of two.", '{"type": "object", "properties": {"place": {"type": "string"}}}'),
    Tool("warmkv_other", "The other.", '{"type": "object", "properties": {"count": {"type": "integer"}}}'),
)
_CALLS = (
    ToolCall("warmkv001", "warmkv_first", '{"place": "Zürich \\"North\\"", "days": [1, 2], "exact": true}'),
    ToolCall("warmkv002", "warmkv_other", '{"count": 3}'),
)
_PLAIN_CALLS = (ToolCall("warmkv001", "warmkv_first", '{"place": "Zurich"}'),)
_TWO_PLAIN_CALLS = (*_PLAIN_CALLS, _CALLS[1])
_ANSWER, _THOUGHT = mark(8), mark(9)
_USER = ChatMessage("user", mark(7))
_BEGUN = (REASONING[0], ("<|channel>thought", "<channel|>"))
"""Marks of reasoning that templates begin or look for, and don't write."""


@dataclass(frozen=True)
class Traits:
    """
    Attributes:
        tools: what becomes of a tool: written, or why not.
        form: the format of calls; None if there is none that can be read back.
        arguments_as_text: whether the template wants a call's arguments as text.
        several: whether an answer may have more than one call.
        reasoning: the marks around it; None if there are none.
        keeps_reasoning: whether it writes reasoning of answers before the last question.
        variables: that the template takes.
        syntax: of calls; None if they can't be forced.
        says, said: what the model writes before and behind a text, and the reader takes away.
        gap: what it writes behind reasoning before an answer that isn't only text; empty for white space.
    """

    tools: str = "not written"
    form: ToolFormat | None = None
    arguments_as_text: bool = False
    several: bool = False
    reasoning: tuple[str, str] | None = None
    keeps_reasoning: bool = False
    variables: tuple[str, ...] = ()
    syntax: CallSyntax | None = None
    says: str = ""
    said: str = ""
    gap: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "form": self.form.name if self.form is not None else ""}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Traits:
        """What `as_json` gave, as JSON brings it."""
        reasoning = found["reasoning"]
        told = {
            **found,
            "form": BY_NAME.get(found["form"]),
            "reasoning": None if reasoning is None else (reasoning[0], reasoning[1]),
            "variables": tuple(found["variables"]),
            "syntax": None if found["syntax"] is None else CallSyntax(**found["syntax"]),
        }
        return cls(**told)

    def thinks(self, prompt: str) -> bool:
        """Whether a prompt ends within reasoning that the template has begun."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning[0])


def traits_of(template: Template, ends: Mapping[int, str]) -> Traits:
    """
    Args:
        ends: how the template writes the tokens that end an answer.
    """
    found = Traits(
        _written(template),
        reasoning=_reasoning(template),
        keeps_reasoning=_keeps(template),
        variables=template.renderer.variables,
    )
    if found.tools != "written":
        return found
    for as_text in (False, True):
        under = template.under(Setup(_TOOLS), arguments_as_text=as_text)
        for calls in (_CALLS, _CALLS[:1], _PLAIN_CALLS):
            answer = _answer(under, calls, found, ends)
            if answer is None:
                continue
            for form in FORMATS:
                if _reads(form, answer, calls, found):
                    found = replace(found, form=form, arguments_as_text=as_text, several=len(calls) > 1)
                    return _spoken(template, replace(found, syntax=_syntax(under, form, found, ends)), ends)
    return found


def _syntax(template: Template, form: ToolFormat, traits: Traits, ends: Mapping[int, str]) -> CallSyntax | None:
    """How calls are written, of arguments that are written in one way only."""
    one, both = (_answer(template, calls, traits, ends) for calls in (_PLAIN_CALLS, _TWO_PLAIN_CALLS))
    if one is None:
        return None
    thought = traits.reasoning[1] if traits.reasoning is not None else ""
    return syntax_of(form, _TWO_PLAIN_CALLS, one[0], both[0] if both is not None else "", thought)


def _spoken(template: Template, traits: Traits, ends: Mapping[int, str]) -> Traits:
    """With what stands around a text, where the reader knows it."""
    try:
        prompt = template.write(template.shape((), [_USER], answer=True), [_USER], answer=True)
    except InvalidField:
        return traits
    says, _, said = _said(template, [_USER, ChatMessage("assistant", _ANSWER)]).removeprefix(prompt).partition(_ANSWER)
    says = (says.rpartition(traits.reasoning[1])[2] if traits.reasoning is not None else says).strip()
    said = said[: min((said.find(end) for end in ends.values() if end.strip() and end in said), default=len(said))]
    reader = MessageReader(traits.reasoning, traits.form, str, tools=_TOOLS)
    if not says or reader.push(says + _ANSWER + said).text + reader.finish().text != _ANSWER:
        return traits
    gap = ""
    if traits.reasoning is not None:
        written = _said(template, [_USER, ChatMessage("assistant", _ANSWER, reasoning=_THOUGHT)])
        behind = written.partition(_THOUGHT)[2].partition(traits.reasoning[1])[2]
        gap = behind.partition(says)[0] if says in behind else ""
    return replace(traits, says=says, said=said.strip(), gap=gap.strip())


def _written(template: Template) -> str:
    """What becomes of tools."""
    try:
        shape = template.under(Setup(_TOOLS)).shape((), [_USER], answer=True)
        if shape.error:
            return f"refused: {shape.error}"
        written = template.under(Setup(_TOOLS)).write(shape, [_USER], answer=True)
    except InvalidField as refusal:
        return f"refused: {refusal}"
    return "written" if all(tool.name in written for tool in _TOOLS) else "not written"


def _reasoning(template: Template) -> tuple[str, str] | None:
    """The marks that stand around reasoning, or that the template looks for."""
    written = _said(template, [_USER, ChatMessage("assistant", _ANSWER, reasoning=_THOUGHT)])
    behind = written.partition(_USER.content)[2]
    for begin, end in REASONING:
        before, thought, after = behind.partition(_THOUGHT)
        if thought and begin in before and end in after:
            return begin, end
    source = "\n".join(template.renderer.sources)
    return next(((begin, end) for begin, end in REASONING if end in source and (begin, end) in _BEGUN), None)


def _keeps(template: Template) -> bool:
    conversation = [_USER, ChatMessage("assistant", _ANSWER, reasoning=_THOUGHT), ChatMessage("user", "-")]
    return _THOUGHT in _said(template, conversation)


def _said(template: Template, messages: Sequence[ChatMessage]) -> str:
    shape = template.shape((), messages, answer=False)
    if shape.error:
        return ""
    try:
        return template.write(shape, messages, answer=False)
    except InvalidField:
        return ""


def _answer(
    template: Template, calls: tuple[ToolCall, ...], traits: Traits, ends: Mapping[int, str]
) -> tuple[str, bool] | None:
    """What the model has to write to make these calls, and whether that begins within reasoning; None if it can't."""
    made = ChatMessage("assistant", "", calls=calls)
    try:
        prompt = template.write(template.shape((), [_USER], answer=True), [_USER], answer=True)
        written = template.write(template.shape((), [_USER, made], answer=False), [_USER, made], answer=False)
    except (InvalidField, Refused):
        return None
    thinks = traits.thinks(prompt)
    if not written.startswith(prompt) and traits.reasoning is not None:
        # Reasoning that the prompt begins, or has empty, is not written before calls, or not in this way.
        begun = prompt[at:] if (at := prompt.rfind(traits.reasoning[0])) > 0 else ""
        prompt = prompt.removesuffix(begun)
        thinks = thinks and written[len(prompt) :].lstrip().startswith(traits.reasoning[1])
        if traits.reasoning[1] in begun and written[len(prompt) :].startswith(traits.reasoning[1]):
            prompt += traits.reasoning[1]  # which the prompt has, too
    if not written.startswith(prompt):
        return None
    behind = written[len(prompt) :]
    cut = min((behind.find(end) for end in ends.values() if end.strip() and end in behind), default=len(behind))
    return behind[:cut], thinks


def _reads(form: ToolFormat, answer: tuple[str, bool], calls: tuple[ToolCall, ...], traits: Traits) -> bool:
    """Whether the calls are read back, and nothing besides."""
    reader = MessageReader(traits.reasoning, form, lambda n: f"warmkv{n:03}", thinks=answer[1], tools=_TOOLS)
    text = reader.push(answer[0]).text + reader.finish().text
    if text.strip() or len(reader.finished) != len(calls):
        return False
    for read, made in zip(reader.finished, calls, strict=True):
        try:
            same = json.loads(read.call.arguments) == json.loads(made.arguments)
        except ValueError:
            return False
        if read.status != "valid" or read.call.name != made.name or not same:
            return False
    return True
