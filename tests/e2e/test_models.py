"""`warmkv models check`: what the server would do with a model, before it does it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.commands import run_warmkv as run
from tests.e2e.harness import serving
from tests.engine.tokenizers import variant
from warmkv_server.engine.model.load import BUILT_IN

TEMPLATE = """\
{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|user|>' + (first | default('') if loop.first else '') -}}
{%- for part in m.content -%}{{- part.text -}}{%- endfor -%}
{%- elif m.role == 'assistant' -%}{{- '<|assistant|>' + m.content + '<|close|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def test_what_a_template_does_is_found_out_and_said_at_start(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    variant(folder, special=["<|close|>"], chat_template=TEMPLATE)
    (folder / "model.safetensors").symlink_to(BUILT_IN / "tiny" / "model.safetensors")
    done = run("models", "check", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["context_limit"], found["vocabulary"], found["caches"]) == (32768, 4096, {"append": 4})
    assert found["ends"][0] == {"id": 1, "text": "<|end|>", "named_by": ["config", "tokenizer"]}
    template = found["template"]
    assert template["roles"]["user"] == "written, as a list of parts"
    assert template["roles"]["tool"] == "not written, and so refused"
    assert template["system_alone"].startswith("waits for the user's message")
    assert template["two_systems"] == "not written, and so refused"
    assert template["closes_with"] == "<|close|>"
    assert (template["tools"], template["reasoning"], template["follow_up"]) == (
        "not written, and so refused",
        "none that is known",
        "written",
    )
    assert found["tokenizer"]["changes"] == {}
    with serving(tmp_path / "data", "--model", str(folder)) as (server, _):
        log = server.log_text()
    assert found["unusual"]
    assert all(line in log for line in found["unusual"])
    assert "tools: not written, and so refused; reasoning: none that is known" in log
    plain = run("models", "check", str(folder))
    assert all(line in plain.stdout for line in found["unusual"])


def test_nothing_is_unusual_of_the_built_in_model() -> None:
    assert json.loads(run("models", "check", "builtin:tiny", "--json").stdout)["unusual"] == []


def test_a_model_that_would_be_refused_is_said_with_the_reason(tmp_path: Path) -> None:
    done = run("models", "check", str(tmp_path / "none"), "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["refused"] in done.stderr
