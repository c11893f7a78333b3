"""What an answer is held to: its response format, what may be called, and the reasoning that comes before either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from warmkv_server.agents.context import Context
from warmkv_server.agents.types import GenerateRequest
from warmkv_server.contract.content import AS_IT_LIKES, Chat, Tool, ToolChoice, ToolMode
from warmkv_server.contract.grammar import Calls, Grammar, GrammarKind, Message, Thought
from warmkv_server.errors import InvalidField, Unsupported
from warmkv_server.text.formats import ToolFormat
from warmkv_server.text.schemas import require_strict, strict_grammar
from warmkv_server.text.traits import Traits


def held_to(request: GenerateRequest, context: Context, traits: Traits) -> Grammar | None:
    """None for anything.

    Raises:
        InvalidField: if tools are named that the context hasn't, or none can be called.
        Unsupported: if this model's calls can't be forced, or not beside such a text.
    """
    text, choice, tools = request.answer.grammar, request.choice, context.conversation.tools
    if not request.told_apart:
        return text
    allowed = _allowed(choice, tools)
    may_call = bool(tools) and choice.mode is not ToolMode.NONE
    bound = may_call and (choice != AS_IT_LIKES or any(tool.strict for tool in allowed.values()))
    if text is None and not bound and not (tools and choice.mode is ToolMode.NONE):
        return None
    if request.answer.ignore_eos:
        raise InvalidField.of("ignore_eos", "can't be had with strict tools, which say where an answer ends")
    calls = _calls(choice, allowed, traits, text) if may_call else None
    form, marks = traits.form, traits.reasoning
    if form is not None and form.opened and tools and not may_call:
        raise Unsupported(
            f"tool_choice: an answer of this model ({form.name}) can't be held to a text; leave it out",
            field="tool_choice",
        )
    opens = isinstance(request.content, Chat) and not request.content.continue_last
    message = Message(
        thought=Thought("" if context.thinks else marks[0], marks[1], traits.gap) if marks is not None else None,
        calls=calls,
        speaks=choice.mode is not ToolMode.REQUIRED,
        text=text,
        marks=_marks(form, calls) if form is not None and tools and (calls is not None or text is None) else (),
        bare=form is not None and not form.begins and bool(tools),
        says=traits.says if opens else "",
        said=traits.said,
    )
    if message == Message(text=text):
        return text
    return Grammar(GrammarKind.MESSAGE, place="response_format" if text is not None else "tool_choice", message=message)


def _allowed(choice: ToolChoice, tools: Sequence[Tool]) -> dict[int, Tool]:
    """The tools that may be called, by their numbers."""
    known = {tool.name for tool in tools}
    if choice.mode is ToolMode.REQUIRED and not tools:
        raise InvalidField.of("tool_choice", "the context has no tools; give some in content.chat.tools")
    for number, name in enumerate(choice.names):
        if name not in known:
            has = ", ".join(sorted(known))[:200] or "none"
            raise InvalidField.of(f"tool_choice.allowed_names[{number}]", f"{name!r} is no tool of it; it has {has}")
    return {n: tool for n, tool in enumerate(tools) if not choice.names or tool.name in choice.names}


def _calls(choice: ToolChoice, tools: Mapping[int, Tool], traits: Traits, text: Grammar | None) -> Calls:
    form, syntax = traits.form, traits.syntax
    remedy = "set tool_choice.mode to TOOL_CHOICE_MODE_NONE, or leave it out"
    if form is None or syntax is None:  # perhaps the tools are of another model's time
        what, name = "tool_choice" if text is None else text.field, form.name if form is not None else "no known form"
        raise Unsupported(f"{what}: calls as this model writes them ({name}) can't be forced; {remedy}", field=what)
    if text is not None and not form.begins:
        raise Unsupported(
            f"{text.field}: calls as this model writes them ({form.name}) can't be told from an answer of this form; "
            f"{remedy}",
            field=text.field,
        )
    if text is not None and text.kind is GrammarKind.LARK:
        raise Unsupported(f"{text.field}: calls can't be told from a sentence of a grammar; {remedy}", field=text.field)
    require_strict(tools, traits)
    named = tuple((tool.name, strict_grammar(tool, n) if tool.strict else None) for n, tool in tools.items())
    begins = next((mark for mark in (*form.begins, *form.around) if syntax.opens.startswith(mark)), "")
    return Calls(syntax, named, choice.most, begins)


def _marks(form: ToolFormat, calls: Calls | None) -> tuple[str, ...]:
    """What no text may have in it."""
    more = (calls.mark,) if calls is not None and calls.mark and calls.mark not in form.begins else ()
    return (*form.begins, *more)
