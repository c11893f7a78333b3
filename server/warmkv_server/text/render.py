"""Having the model's chat template write: as transformers does it, with a conversation's own clock and variables."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, meta, nodes
from transformers.utils import chat_template_utils

from warmkv_server.contract.content import ChatMessage, Setup, Tool

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper  # imports MLX

_CLOCK = "strftime_now"
_GIVEN = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("raise_exception", "namespace", "range", "dict", "lipsum", "cycler", "joiner", _CLOCK),
        *("true", "false", "none", "True", "False", "None"),
        *("custom_tools", "builtin_tools", "available_tools", "functions"),
    )
)
"""Names in a template that are no variables of a request: what transformers gives it, and other names of the tools."""


class Renderer:
    """One chat template, or one with another for tools.

    mlx-lm's wrapper sets a variable of the template (`enable_thinking`), so it is transformers' own that renders. Where
    mlx-lm brings the template itself, as a function, it is mlx-lm's.

    Attributes:
        dated: whether a template looked at the clock since this was last set to False.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._own = tokenizer._chat_template is not None
        self._tokenizer: Any = tokenizer if self._own else tokenizer._tokenizer
        self._clock = 0.0
        self.dated = False
        self.sources = [] if self._own else _sources(self._tokenizer.chat_template)
        self.reads_clock = any(_CLOCK in source for source in self.sources)

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """Names that a template looks up and nobody gives it: what a request may set."""
        found: set[str] = set()
        for source in self.sources:
            with contextlib.suppress(TemplateError):
                parsed = _compiled(source).environment.parse(source)
                # What it sets somewhere is its own, unless it asks whether it is there.
                asked = {each.node.name for each in parsed.find_all(nodes.Test) if _asks(each)}
                own = {each.name for each in parsed.find_all(nodes.Name) if each.ctx != "load"}
                found |= meta.find_undeclared_variables(parsed) - (own - asked)
        return tuple(sorted(found - _GIVEN - set(self._tokenizer.special_tokens_map)))

    def apply(
        self, messages: Sequence[Mapping[str, Any]], answer: bool, setup: Setup, tools: Sequence[Any] | None
    ) -> str:
        """What it writes. Raises whatever the template does."""
        self._clock = setup.clock
        self._set_clock()
        variables: dict[str, Any] = json.loads(setup.variables) if setup.variables else {}
        if tools:
            variables["tools"] = list(tools)
        written = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=answer, **variables
        )
        return str(written)

    def _set_clock(self) -> None:
        """Have templates read this clock. Who renders one next gets the same compiled one."""
        for source in self.sources if self.reads_clock else ():
            _compiled(source).globals[_CLOCK] = self._now

    def _now(self, form: str) -> str:
        self.dated = True
        return datetime.fromtimestamp(self._clock).astimezone().strftime(form)


def tool_as_told(tool: Tool) -> dict[str, Any]:
    """A tool as templates take it."""
    parameters = json.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def message_as_told(message: ChatMessage, *, as_parts: bool, arguments_as_text: bool) -> dict[str, Any]:
    """A message as templates take it."""
    content = [{"type": "text", "text": message.content}] if as_parts else message.content
    told: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning:
        told["reasoning_content"] = message.reasoning
    if message.calls:
        told["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": call.arguments if arguments_as_text else json.loads(call.arguments),
                },
            }
            for call in message.calls
        ]
    if message.call_id:
        told["tool_call_id"] = message.call_id
    if message.name:
        told["name"] = message.name
    return told


def _sources(template: Any) -> list[str]:
    """The text of a tokenizer's template, or of its templates by name."""
    found = template.values() if isinstance(template, dict) else [template]
    return [each for each in found if isinstance(each, str)]


def _asks(test: nodes.Test) -> bool:
    return test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)


def _compiled(source: str) -> Any:
    """A template as transformers compiles it, once."""
    return chat_template_utils._compile_jinja_template(source)
