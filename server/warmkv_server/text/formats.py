"""The formats in which models write tool calls and reasoning. Which of them a model has is found out by trying."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from mlx_lm.tool_parsers import function_gemma, gemma4, glm47, minicpm5, minimax_m2, pythonic, qwen3_coder

from warmkv_server.text import dsml


@dataclass(frozen=True)
class ToolFormat:
    """How calls stand in an answer.

    A call is a JSON object with its name in it, alone or in a list; or, if there is a `header`, a header with its name
    and the JSON of its arguments behind; or, if there is a `parser`, whatever that reads.

    Attributes:
        name: for people, and for GetServerInfo.
        begins: what a call, or a list of them, begins with; nothing if the answer itself is one.
        end: what stands behind it; empty for nothing.
        header: what the text up to `opens` has to be, with the groups `name` and perhaps `id`.
        opens: what stands between the header and the arguments.
        tail: what may stand between the arguments and the end.
        around: marks that say nothing.
        parser: by its name in `PARSERS`.
        keyed: whether the object has the arguments under the name of the tool, and nothing else.
        opened: what the prompt has of the answer's first mark.
    """

    name: str
    begins: tuple[str, ...] = ()
    end: str = ""
    header: str = ""
    opens: str = ""
    tail: str = ""
    around: tuple[str, ...] = ()
    parser: str = ""
    keyed: bool = False
    opened: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """All that doesn't belong to the text."""
        return (*self.begins, *self.around)


def _mlx(name: str, begin: str, end: str) -> ToolFormat:
    return ToolFormat(name, (begin,), end, parser=name)


_NAME = r"(?P<name>[\w.\-]+)"
FORMATS = (
    ToolFormat("json_tools", ("<tool_call>",), "</tool_call>"),
    ToolFormat("json_tools_list", ("<tool_calls>",), "</tool_calls>"),
    ToolFormat("json_tool_call", ("<|tool_call|>",), "<|/tool_call|>"),
    ToolFormat("granite", ("<|tool_call|>",)),
    ToolFormat("nemotron", ("<TOOLCALL>",), "</TOOLCALL>"),
    ToolFormat("mistral", ("[TOOL_CALLS]",)),
    ToolFormat("mistral_args", ("[TOOL_CALLS]",), header=_NAME + r"(\[CALL_ID\](?P<id>\w+))?", opens="[ARGS]"),
    ToolFormat(
        "deepseek_v3_1",
        ("<｜tool▁call▁begin｜>",),
        "<｜tool▁call▁end｜>",
        _NAME,
        "<｜tool▁sep｜>",
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    ToolFormat(
        "deepseek_v3",
        ("<｜tool▁call▁begin｜>",),
        "<｜tool▁call▁end｜>",
        r"function<｜tool▁sep｜>" + _NAME + r"\s*",
        "```json",
        "```",
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    ToolFormat(
        "kimi_k2",
        ("<|tool_call_begin|>",),
        "<|tool_call_end|>",
        r"\s*(?P<id>(functions\.)?" + _NAME + r"(:\d+)?)\s*",
        "<|tool_call_argument_begin|>",
        around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    ToolFormat(
        "gpt_oss",
        ("<|channel|>commentary to=functions.", " to=functions.", "<|start|>assistant to=functions."),
        header=_NAME + r"[^{]*",
        opens="<|message|>",
        around=("<|start|>assistant", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>", "<|end|>"),
    ),
    ToolFormat("cohere", ("<|START_ACTION|>",), "<|END_ACTION|>", around=("<|START_RESPONSE|>", "<|END_RESPONSE|>")),
    ToolFormat("functionary", ("<function=",), "</function>", _NAME, ">"),
    ToolFormat("functionary_v3_2", (">>>",), header=_NAME, opens="\n", around=(">>>all\n",), opened=">>>"),
    ToolFormat("gigachat", ("<|function_call|>",)),
    ToolFormat("apertus", ("<|tools_prefix|>",), "<|tools_suffix|>", keyed=True),
    ToolFormat(
        "solar",
        ("<|tool_call:begin|>",),
        "<|tool_call:end|>",
        r"(?P<id>[\w\-]+)<\|tool_call:name\|>" + _NAME,
        "<|tool_call:args|>",
        around=("<|tool_calls|>", "<|calls|>", "<|content|>"),
    ),
    ToolFormat("llama3_json", around=("<|python_tag|>",)),
    _mlx("qwen3_coder", "<tool_call>", "</tool_call>"),
    _mlx("glm47", "<tool_call>", "</tool_call>"),
    _mlx("minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>"),
    _mlx("pythonic", "<|tool_call_start|>", "<|tool_call_end|>"),
    _mlx("function_gemma", "<start_function_call>", "<end_function_call>"),
    _mlx("gemma4", "<|tool_call>", "<tool_call|>"),
    _mlx("minicpm5", "<function name=", "</function>"),
    ToolFormat("seed_oss", ("<seed:tool_call>",), "</seed:tool_call>", parser="qwen3_coder"),
    ToolFormat("dsml", ("<｜DSML｜function_calls>",), "</｜DSML｜function_calls>", parser="dsml"),
    ToolFormat("dsml_v4", ("<｜DSML｜tool_calls>",), "</｜DSML｜tool_calls>", parser="dsml"),
)
"""In the order in which they are tried: the first that reads what the chat template writes is the model's."""
BY_NAME = {each.name: each for each in FORMATS}

REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<reasoning>", "</reasoning>"),
)
"""Marks around reasoning."""


PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "qwen3_coder": qwen3_coder.parse_tool_call,
    "glm47": glm47.parse_tool_call,
    "minimax_m2": minimax_m2.parse_tool_call,
    "pythonic": pythonic.parse_tool_call,
    "function_gemma": function_gemma.parse_tool_call,
    "gemma4": gemma4.parse_tool_call,
    "minicpm5": minicpm5.parse_tool_call,
    "dsml": dsml.parse_tool_call,
}
"""mlx-lm's, and one of ours: what stands between the marks, and the tools, to one call or a list of them."""


@cache
def header_of(form: ToolFormat) -> re.Pattern[str]:
    return re.compile(form.header, re.DOTALL)
