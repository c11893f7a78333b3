"""Whether the messages and tools of a chat make sense by themselves."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from warmkv.v1 import agent_service_pb2 as pb
from warmkv_server.errors import Unsupported
from warmkv_server.service import convert, limits

if TYPE_CHECKING:
    from warmkv_server.service.validate import Faults  # which looks at chats with this

_CHAT = "content.chat"
_TOOL_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOOL_NAME_RULE = f"must have 1 to {limits.TOOL_NAME_CHARACTERS} characters of A-Z a-z 0-9 . _ -"


def chat(faults: Faults, chat: pb.ChatMessages) -> None:
    """
    Raises:
        Unsupported: for an image.
    """
    for number, message in enumerate(chat.messages):
        good = 0 < len(message.role) <= limits.ROLE_CHARACTERS
        if not good:
            rule = f"must have 1 to {limits.ROLE_CHARACTERS} characters"
            about = limits.about(limits.ROLE_CHARACTERS, len(message.role), "characters")
            faults.note(f"{_CHAT}.messages[{number}].role", rule, about)
        if len(message.ListFields()) > 2 or message.parts or message.tool_calls:
            _more(faults, f"{_CHAT}.messages[{number}]", message)
    if chat.HasField("tools"):
        _tools(faults, chat.tools)
    if chat.HasField("template_variables"):
        _variables(faults, chat)
    if chat.continue_last and chat.messages:
        _continued(faults, chat.messages[-1], len(chat.messages) - 1)


def choice(faults: Faults, request: pb.GenerateRequest) -> None:
    """What may be called; which tools there are is known with the context."""
    wanted = request.tool_choice
    faults.need(wanted.mode in convert.TOOL_MODES, "tool_choice.mode", f"{wanted.mode} is none that this server knows")
    calls = wanted.mode != pb.TOOL_CHOICE_MODE_NONE
    faults.need(convert.told_apart(request), "tool_choice", "needs PARSE_MODE_MESSAGE, which is the default for a chat")
    faults.need(
        not request.ignore_eos, "ignore_eos", "can't be had with a tool_choice, which says where an answer ends"
    )
    forced = wanted.mode == pb.TOOL_CHOICE_MODE_REQUIRED
    rule = "can't be had with TOOL_CHOICE_MODE_REQUIRED: such an answer is calls"
    faults.need(not (forced and request.HasField("response_format")), "response_format", rule)
    names, most = wanted.allowed_names, limits.TOOLS
    rule = f"may have {most} different entries at most, and none with TOOL_CHOICE_MODE_NONE"
    good = len(set(names)) == len(names) <= most and (calls or not names)
    faults.need(good, "tool_choice.allowed_names", rule)
    most = limits.CALLS
    good = 0 <= wanted.max_calls <= most and (calls or not wanted.max_calls)
    faults.need(good, "tool_choice.max_calls", f"must be 0 (no limit) to {most}, and 0 with TOOL_CHOICE_MODE_NONE")


def _more(faults: Faults, field: str, message: pb.ChatMessage) -> None:
    """What a message has besides its role and its text."""
    for number, part in enumerate(message.parts):
        if part.WhichOneof("kind") == "image":
            image = f"{field}.parts[{number}].image"
            raise Unsupported(f"{image}: this model takes no images; describe it in a text", field=image)
        faults.need(part.WhichOneof("kind") == "text", f"{field}.parts[{number}]", "must have a text")
    faults.need(not (message.parts and message.content), f"{field}.parts", "can't be given together with content")
    of_assistant = message.role == "assistant"
    rule = "can be given with role assistant only"
    faults.need(of_assistant or not message.reasoning, f"{field}.reasoning", rule)
    faults.need(of_assistant or not message.tool_calls, f"{field}.tool_calls", rule)
    is_result = message.role == "tool"
    rule = "can be given with role tool only"
    faults.need(is_result or not message.tool_call_id, f"{field}.tool_call_id", rule)
    faults.need(is_result or not message.name, f"{field}.name", rule)
    most = limits.CALL_ID_CHARACTERS
    faults.need_at_most(most, len(message.tool_call_id), "characters", f"{field}.tool_call_id")
    faults.need_at_most(limits.TOOL_NAME_CHARACTERS, len(message.name), "characters", f"{field}.name")
    faults.need_at_most(limits.CALLS, len(message.tool_calls), "entries", f"{field}.tool_calls")
    for number, call in enumerate(message.tool_calls[: limits.CALLS]):
        name = f"{field}.tool_calls[{number}]"
        good = 0 < len(call.id) <= limits.CALL_ID_CHARACTERS
        faults.need(good, f"{name}.id", f"must have 1 to {limits.CALL_ID_CHARACTERS} characters")
        faults.need(_TOOL_NAME.fullmatch(call.name) is not None, f"{name}.name", _TOOL_NAME_RULE)
        if (wrong := _not_an_object(call.arguments_json)) is not None:
            faults.note(f"{name}.arguments_json", wrong)
    ids = [call.id for call in message.tool_calls]
    faults.need(len(ids) == len(set(ids)), f"{field}.tool_calls", "must have different ids")


def _tools(faults: Faults, tools: pb.ToolList) -> None:
    field = f"{_CHAT}.tools.tools"
    faults.need_at_most(limits.TOOLS, len(tools.tools), "entries", field)
    names = [tool.name for tool in tools.tools]
    faults.need(len(names) == len(set(names)), field, "must have different names")
    size = sum(len(tool.name) + len(tool.description) + len(tool.parameters_json) for tool in tools.tools)
    rule = f"may have {limits.TOOLS_CHARACTERS} characters at most in all"
    faults.need_at_most(limits.TOOLS_CHARACTERS, size, "characters", field, rule)
    for number, tool in enumerate(tools.tools[: limits.TOOLS]):
        faults.need(_TOOL_NAME.fullmatch(tool.name) is not None, f"{field}[{number}].name", _TOOL_NAME_RULE)
        if (wrong := _not_an_object(tool.parameters_json)) is not None:
            faults.note(f"{field}[{number}].parameters_json", wrong)


def _variables(faults: Faults, chat: pb.ChatMessages) -> None:
    most = limits.VARIABLES_CHARACTERS
    size = len(convert.variables(chat))
    rule = f"may have {most} characters at most, as JSON"
    faults.need_at_most(most, size, "characters", f"{_CHAT}.template_variables", rule)


def _continued(faults: Faults, message: pb.ChatMessage, number: int) -> None:
    field = f"{_CHAT}.continue_last"
    rule = "needs a last message of role assistant, with a text and without tool_calls"
    good = message.role == "assistant" and not message.tool_calls and bool(message.content or message.parts)
    faults.need(good, field, f"{rule}; messages[{number}] is none")


def _not_an_object(text: str) -> str | None:
    """What is wrong with JSON that must be an object, or nothing; None if all is well."""
    if not text:
        return None
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return f"must be JSON: {str(error)[:100]}"
    return None if isinstance(value, dict) else "must be a JSON object"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is none")
