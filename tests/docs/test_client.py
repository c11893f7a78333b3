"""docs/client.md says what `warmkv.client` does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from warmkv.client import SERVICE_CONFIG
from warmkv_server.service.errors import CODES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs/client.md").read_text()


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
