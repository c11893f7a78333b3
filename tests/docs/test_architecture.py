"""docs/architecture.md names files and functions that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "server/warmkv_server"
NAMES = re.findall(r"`([a-z_/]+\.py): ([A-Za-z_.]+)`", (ROOT / "docs/architecture.md").read_text())


def test_it_names_some() -> None:
    assert len(NAMES) > 30


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_what_it_names_is_there(file: str, name: str) -> None:
    inside: list[ast.stmt] = ast.parse((SERVER / file).read_text()).body
    for part in name.split("."):
        found = [node for node in inside if getattr(node, "name", None) == part]
        assert found, f"{file} has no {name}"
        inside = getattr(found[0], "body", [])
