"""docs/client.md says what `warmkv.client` does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from warmkv.client import SERVICE_CONFIG
from warmkv_server.errors import METADATA
from warmkv_server.service.errors import CODES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs/client.md").read_text()
CONTRACT = (ROOT / "proto/warmkv/v1/agent_service.proto").read_text()


def test_the_service_config_is_the_one_that_is_used() -> None:
    (found,) = re.findall(r"<!-- service config -->\n```json\n(.*?)```", DOCUMENT, re.DOTALL)
    assert json.loads(found) == SERVICE_CONFIG


@pytest.mark.parametrize("name", ["go/main.go", "node/client.mjs", "java/src/main/java/Client.java"])
def test_the_examples_retry_by_it(name: str) -> None:
    (found,) = re.findall(r'\{"methodConfig".*?\n *\}\]\}', (ROOT / "examples" / name).read_text(), re.DOTALL)
    assert json.loads(found) == SERVICE_CONFIG


def test_every_code_has_its_advice() -> None:
    advice = re.findall(r"^\| ([A-Z_, ]+) \|", DOCUMENT, re.MULTILINE)
    assert {code.name for code in CODES.values()} <= set(", ".join(advice).split(", "))


def test_every_reason_has_its_advice() -> None:
    advice = "\n".join(line for line in DOCUMENT.splitlines() if line.startswith("| "))
    assert {kind.reason for kind in CODES} <= set(re.findall(r"`([A-Z_]+)`", advice))


def test_all_that_errors_say_to_programs_is_explained() -> None:
    rows = re.findall(r"^\| (`[a-z_`, ]+) \|", DOCUMENT, re.MULTILINE)
    assert {name for row in rows for name in re.findall("[a-z_]+", row)} == METADATA.keys()
    said = CONTRACT[CONTRACT.index("The metadata has") : CONTRACT.index("Any RPC can fail with")]
    names = re.findall(r"(?:^//   - |; )([a-z_, ]+): ", said, re.MULTILINE)
    assert {name for each in names for name in each.split(", ")} == METADATA.keys()
