"""Writes a model that says what the examples' agent loop needs: `python -m tests.clients.scripted FOLDER`.

It asks for the weather in Zürich; told that, it calls the calculator; told its result, it answers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.engine.parrot import write_speaker

TEMPLATE = (Path(__file__).parents[2] / "examples" / "agent_loop" / "tools.jinja").read_text()
PROMPT = "{{- '<|assistant|>' }}"
SAYINGS = (
    ("<|assistant|>", '<tool_call>{"name": "weather", ', '"arguments": {"place": "Zürich"}}</tool_call>'),
    ("<|weather|>", '<tool_call>{"name": "calculate", ', '"arguments": {"expression": "12 * 9 / 5 + 32"}}</tool_call>'),
    ("<|calculate|>", "It has ", "53.6 degrees."),
)


def write(folder: Path) -> None:
    told = "{%- if messages[-1].name %}{{- '<|' ~ messages[-1].name ~ '|>' }}{%- endif %}"
    assert PROMPT in TEMPLATE
    write_speaker(folder, TEMPLATE.replace(PROMPT, PROMPT + told), SAYINGS)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
