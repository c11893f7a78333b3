"""What the server makes of a model's tokenizer and chat template, found out by trying them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from warmkv_server.contract.content import ChatMessage
from warmkv_server.contract.conversation import Ending
from warmkv_server.errors import InvalidField, Unsupported
from warmkv_server.text.follow_up import follow_up
from warmkv_server.text.template import Shape, Template
from warmkv_server.text.traits import Traits

_SAMPLES = ("Hello, world!", " It's 2 o'clock.\n\tAnd  so on ", "Über 日本語 नमस्ते", "👩‍🚀🙂", "a\0b")
Findings = Mapping[str, Any]
"""As JSON has it."""


def probe(tokenizer: Any, template: Template | None, ends: Mapping[int, str], traits: Traits | None) -> Findings:
    """
    Args:
        ends: how the template writes the tokens that end an answer.
        traits: of the template.
    """
    changed = {text: back for text in _SAMPLES if (back := _there_and_back(tokenizer, text)) != text}
    return {
        "tokenizer": {
            "class": type(tokenizer._tokenizer).__name__,
            "ids": len(tokenizer),
            "changes": changed,
        },
        "template": None if template is None or traits is None else _of_template(template, ends, traits),
    }


def unusual(findings: Findings) -> list[str]:
    """One line for each finding that a client may run into."""
    lines = []
    if changes := findings["tokenizer"]["changes"]:
        text, back = next(iter(changes.items()))
        lines.append(
            f"{len(changes)} of {len(_SAMPLES)} texts don't come back from the tokenizer as they were: {text!r} "
            f"becomes {back!r}"
        )
    template = findings["template"]
    if template is None:
        return [
            *lines,
            "there is no chat template: content.chat is refused, content.text and content.token_ids are not",
        ]
    for role, found in template["roles"].items():
        if found != "written" and role in ("system", "user", "assistant"):
            lines.append(f"the chat template and a message of role {role}: {found}")
    for name, usual in (("system_alone", "written"), ("two_systems", "written"), ("follow_up", "written")):
        if template[name] != usual:
            lines.append(f"the chat template and {_NAMES[name]}: {template[name]}")
    if template["closes_with"] and template["closes_with"] not in template["ends"]:
        lines.append(
            f"the chat template closes earlier answers with {template['closes_with']!r}, which ends no answer: the "
            "last token of an answer gives way to it when a message follows"
        )
    return lines


_NAMES = {
    "system_alone": "a system message alone",
    "two_systems": "two system messages",
    "follow_up": "messages behind a context",
}


def _of_template(template: Template, ends: Mapping[int, str], traits: Traits) -> dict[str, Any]:
    user, answer, system = ChatMessage("user", "-"), ChatMessage("assistant", "-"), ChatMessage("system", "-")
    conversations = {
        "system": ([system, user], 0),
        "user": ([user], 0),
        "assistant": ([user, answer, user], 1),
        "tool": ([user, answer, ChatMessage("tool", "-")], 2),
        "developer": ([ChatMessage("developer", "-"), user], 0),
    }
    roles = {
        role: _said(template.shape((), messages, answer=True), index)
        for role, (messages, index) in conversations.items()
    }
    alone = _said(template.shape((), [system], answer=False), 0)
    if alone != "written" and roles["system"].startswith("written"):
        alone = "waits for the user's message that follows, and is written with it"
    two = template.shape((), [system, system, user], answer=True)
    behind, closes = _behind(template, user, ends)
    return {
        "roles": roles,
        "system_alone": alone,
        "two_systems": next((said for index in (0, 1) if (said := _said(two, index)) != "written"), "written"),
        "tools": _tools(traits),
        "reasoning": _reasoning(traits),
        "variables": ", ".join(traits.variables) or "none",
        "traits": traits.as_json(),
        "follow_up": behind,
        "closes_with": closes,
        "ends": sorted(ends.values()),
    }


def _behind(template: Template, user: ChatMessage, ends: Mapping[int, str]) -> tuple[str, str]:
    """What becomes of a message behind an answer, and what the template writes between the two."""
    try:
        found = follow_up(template, [user], Ending.ANSWER, None, ends, answer=True)
    except (InvalidField, Unsupported) as refusal:
        return f"refused: {refusal}", ""
    gap = found.text.strip()
    marks = sorted((gap.find(text), -len(text), text) for text in ends.values() if text and text in gap)
    if marks:
        return "written", marks[0][2]
    return "written", gap.partition(">")[0] + ">" if gap.startswith("<") and ">" in gap else ""


def _said(shape: Shape, index: int) -> str:
    if shape.error:
        return f"refused: {shape.error}"
    if index in shape.lost:
        return "not written, and so refused"
    return "written, as a list of parts" if index in shape.parts else "written"


def _tools(traits: Traits) -> str:
    if traits.tools != "written":
        return f"{traits.tools}, and so refused"
    if traits.form is None:
        return "written, but calls can't be read back, and so refused"
    return f"written; calls as {traits.form.name}, {'several' if traits.several else 'one'} an answer"


def _reasoning(traits: Traits) -> str:
    if traits.reasoning is None:
        return "none that is known"
    kept = "written again" if traits.keeps_reasoning else "left out"
    return f"between {traits.reasoning[0]} and {traits.reasoning[1]}; that of earlier answers is {kept}"


def _there_and_back(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))
