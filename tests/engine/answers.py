"""Answers in every format of tool calls, and whether they are read the same however they are cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from warmkv_server.contract.calls import CallArguments, CallFinished, CallNews, CallStarted
from warmkv_server.text.formats import BY_NAME
from warmkv_server.text.reader import MessageReader

_AT_ONCE = 50
"""Cuts of one example: so they cost no more than what is tested."""
THINK = ("<think>", "</think>")
ANSWERS = {
    "json_tools": [
        '<think>\nHm {"a": 1}\n</think>\n\nLet me see.\n<tool_call>\n{"name": "f", '
        '"arguments": {"x": "</tool_call>\\"", "n": 9007199254740993}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"y": [1, {"z": null}]}, "name": "g"}\n'
        "</tool_call>",
        'Hi <tool_call>\n{"name": "f", "arguments": {"x": 1}}}\n</tool_call> and more <tool_',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call><tool_call>garbage</tool_call>',
        '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1.50}}]</tool_call>',
    ],
    "llama3_json": [
        '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}',
        ' {"name": "Ann", "age": 3} is what you asked for',
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"x": {"y": "}"}}}',
    ],
    "mistral": [
        'Well.[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]'
    ],
    "mistral_args": ['[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": {"b": 1}}[TOOL_CALLS]g[ARGS]{}'],
    "deepseek_v3": [
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"x": "```"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ],
    "kimi_k2": [
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        '{"x": 1}<|tool_call_end|><|tool_calls_section_end|>'
    ],
    "gpt_oss": [
        "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>commentary to=functions.f json"
        '<|message|>{"x": 1}'
    ],
    "qwen3_coder": ["So <tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call> then"],
    "json_tools_list": ['<tool_calls>[{"name": "f", "arguments": {"x": "</tool_calls>"}}, {"name": "g"}]</tool_calls>'],
    "json_tool_call": ['So <|tool_call|>{"name": "f", "arguments": {"x": 1}}<|/tool_call|> then'],
    "granite": ['<|tool_call|>[{"name": "f", "arguments": {"x": 1}}] and <|tool_call|>{"name": "g"'],
    "nemotron": [
        '<think>Hm.</think>\n<TOOLCALL>[{"name": "f", "arguments": {"x": [1]}}]</TOOLCALL> <TOOLCALL>no</TOOLCALL>'
    ],
    "deepseek_v3_1": [
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
        '{"x": "<｜tool▁call▁end｜>"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ],
    "cohere": [
        '<|START_RESPONSE|>Well.<|END_RESPONSE|><|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": '
        '{"x": 1}}]<|END_ACTION|>'
    ],
    "functionary": [
        'Well. <function=f>{"x": "</function>"}</function><function=g>{}</function> <function=h>no</function>'
    ],
    "functionary_v3_2": [
        'all\nLet me see.>>>f\n{"x": ">>>g\\n{}"}>>>g\n{}',
        'f\n{"x": 1}>>>all\nSo:\n>>> print(f)\n1 >>>h\n[2]',
        "Hello there\n{\n",
    ],
    "gigachat": ['Well. <|function_call|>{"name": "f", "arguments": {"x": "<|function_call|>"}}'],
    "apertus": [
        'So <|tools_prefix|>[{"f": {"x": "<|tools_suffix|>"}}, {"g": {}}]<|tools_suffix|> then',
        '<|tools_prefix|>[{"f": {}, "g": {}}]<|tools_suffix|><|tools_prefix|>[{"f": 1}]<|tools_suffix|>',
    ],
    "solar": [
        "<|tool_calls|><|tool_call:begin|>abc<|tool_call:name|>f<|tool_call:args|>"
        '{"x": "<|tool_call:end|>"}<|tool_call:end|><|tool_call:begin|>abd<|tool_call:name|>g<|tool_call:args|>{}'
        "<|tool_call:end|><|calls|>"
    ],
    "glm47": ["So\n<tool_call>f<arg_key>x</arg_key><arg_value>a b</arg_value></tool_call><tool_call>g</tool_call>"],
    "minimax_m2": [
        '<minimax:tool_call>\n<invoke name="f">\n<parameter name="x">1</parameter>\n</invoke>\n'
        "</minimax:tool_call> then"
    ],
    "pythonic": [
        'Well. <|tool_call_start|>[f(x="a", y=[1]), g()]<|tool_call_end|><|tool_call_start|>f(<|tool_call_end|>'
    ],
    "function_gemma": ["<start_function_call>call:f{x:<escape>a<escape>}<end_function_call> then"],
    "gemma4": ['<|tool_call>call:f{x:<|"|>a<|"|>,y:[1]}<tool_call|> then <|tool_call>f<tool_call|>'],
    "minicpm5": [
        '<function name="f"><param name="x"><![CDATA[a<b]]></param></function>\n<function name="g"></function>'
    ],
    "seed_oss": ["<seed:tool_call>\n<function=f>\n<parameter=x>1</parameter>\n</function>\n</seed:tool_call> then"],
    "dsml": [
        '</think>So\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="x" string="true">'
        '"a"'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="y" string="false">[1, 2.50]</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n</｜DSML｜function_calls> then',
    ],
    "dsml_v4": [
        '<｜DSML｜tool_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="x" string="false">no</｜DSML｜parameter>'
        "</｜DSML｜invoke></｜DSML｜tool_calls>"
    ],
}


def read(
    form: str, pieces: Sequence[str], *, thinks: bool = False
) -> tuple[str, str, list[CallNews], list[CallFinished]]:
    """Text, reasoning, and news of calls, with pieces of arguments joined."""
    reader = MessageReader(THINK, BY_NAME[form], lambda number: f"call{number:05}", thinks=thinks)
    text = reasoning = ""
    news: list[CallNews] = []
    for told in [*map(reader.push, pieces), reader.finish()]:
        text += told.text
        reasoning += told.reasoning
        for each in told.calls:
            last = news[-1] if news else None
            if isinstance(each, CallArguments) and isinstance(last, CallArguments) and last.index == each.index:
                news[-1] = CallArguments(each.index, last.text + each.text)
            else:
                news.append(each)
    return text, reasoning, news, reader.finished


def cut(text: str, at: Sequence[int]) -> list[str]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in at)})
    return [text[a:b] for a, b in pairwise(places)]


def agree(form: str, text: str, places: Sequence[int], *, thinks: bool = False) -> None:
    whole = read(form, [text], thinks=thinks)
    assert read(form, cut(text, places), thinks=thinks) == whole
    _, _, news, finished = whole
    for call in finished:
        said = "".join(each.text for each in news if isinstance(each, CallArguments) and each.index == call.index)
        assert said == call.call.arguments
        assert [each.id for each in news if isinstance(each, CallStarted) and each.index == call.index] == [
            call.call.id
        ]


def any_cut_gives_the_same_events(form: str, cuts: int) -> None:
    """
    Args:
        cuts: how many are tried: each of an answer of this format, or of the beginning of one.
    """
    said = [text[:end] for text in ANSWERS[form] for end in range(1, len(text) + 1)]
    wholes: dict[tuple[str, bool], object] = {}

    @settings(max_examples=cuts // _AT_ONCE, deadline=None)
    @given(seed=st.integers(0, 1 << 64))
    def holds(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(_AT_ONCE):
            text = chance.choice(ANSWERS[form] if chance.random() < 0.5 else said)
            thinks = chance.random() < 0.2
            if (text, thinks) not in wholes:
                wholes[text, thinks] = read(form, [text], thinks=thinks)
            often = chance.random() ** 3  # mostly few, as tokens are, and now and then behind each character
            places = [n for n in range(1, len(text)) if chance.random() < often]
            assert read(form, cut(text, places), thinks=thinks) == wholes[text, thinks], (text, places)

    for text in ANSWERS[form]:
        agree(form, text, range(len(text)))
    holds()
