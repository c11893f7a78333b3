"""A file's functions as tools: what a model is told, what comes of a call, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from warmkv_server.cli.chat.functions import MOST_CHARACTERS, Function, read
from warmkv_server.errors import OperatorError

FILE = '''\
from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from enum import Enum
from math import sqrt
from typing import Literal

from neighbour import CITIES


class Unit(Enum):
    C = "celsius"


@dataclass
class Place:
    title: str
    country: str = "CH"


def weather(place: Place, unit: Unit = Unit.C, when: date | None = None) -> dict[str, object]:
    """The weather at a place.

    Of one day.

    Args:
        place: Where; one of
            the cities.
        unit (Unit): Of degrees.

    Returns:
        What was measured.
    """
    return {"place": place, "unit": unit, "year": when.year if when else CITIES[0]}


async def root(of: float, kind: Literal["exact", "rough"] = "exact") -> float:
    """A root.

    :param of: a number
    :param str kind: how
        it is taken
    :returns: it
    """
    return sqrt(of)


def long() -> str:
    """Much."""
    return "x" * 200_000


def file() -> str:
    """A name."""
    return "caf\\udce9"


def leaves() -> None:
    """Ends the program."""
    raise SystemExit("bye")


def _helper() -> None:
    pass
'''


@pytest.fixture
def functions(tmp_path: Path) -> dict[str, Function]:
    (tmp_path / "neighbour.py").write_text("CITIES = ['Uri']\n")
    file = tmp_path / "tools.py"
    file.write_text(FILE)
    return read(file)


def test_what_a_model_is_told(functions: dict[str, Function]) -> None:
    assert list(functions) == ["weather", "root", "long", "file", "leaves"]
    weather, root = functions["weather"], functions["root"]
    assert weather.description == "The weather at a place.\n\nOf one day."
    place = {"title": {"type": "string"}, "country": {"default": "CH", "type": "string"}}
    assert weather.parameters["$defs"]["Place"]["properties"] == place
    assert list(weather.parameters["properties"]) == ["place", "unit", "when"]
    assert weather.parameters["properties"]["place"]["description"] == "Where; one of the cities."
    assert weather.parameters["properties"]["unit"]["description"] == "Of degrees."
    assert (weather.parameters["required"], weather.parameters["additionalProperties"]) == (["place"], False)
    assert root.description == "A root."
    assert root.parameters["properties"] == {
        "of": {"type": "number", "description": "a number"},
        "kind": {"default": "exact", "enum": ["exact", "rough"], "type": "string", "description": "how it is taken"},
    }


def test_what_comes_of_a_call(functions: dict[str, Function]) -> None:
    said = functions["weather"].call('{"place": {"title": "Zürich"}, "unit": "celsius", "when": "2026-01-02"}')
    assert json.loads(said) == {"place": {"title": "Zürich", "country": "CH"}, "unit": "celsius", "year": 2026}
    assert functions["root"].call('{"of": 9}') == "3.0"
    assert functions["root"].call('{"of": -1}').startswith("error: ValueError: ")
    assert functions["root"].call('{"of": "nine"}').startswith("error: the arguments are wrong: of: ")
    assert functions["leaves"].call("{}") == "error: SystemExit: bye"
    assert functions["file"].call("{}") == "caf?"
    long = functions["long"].call("{}")
    assert long.startswith("x" * MOST_CHARACTERS)
    assert long.endswith("(cut here: it has 200000 characters)")


WRONG = {
    "nothing": ("_x = 1", "defines no function"),
    "imported": ("from math import sqrt\nfrom json import dumps", "defines no function"),
    "syntax": ("def f(:\n", "line 1: SyntaxError"),
    "raises": ("def g():\n    raise ValueError('no\\nway')\n\ng()", "line 2: ValueError: no way"),
    "leaves": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "silent": ("def f(x: int): pass", "f has no docstring"),
    "unhinted": ("def f(x):\n    'F.'", "no type hint for x"),
    "misspelt": ("def f(x: 'Itn'):\n    'F.'", "type hints that can't be read: name 'Itn'"),
    "many": ("def f(*x: int):\n    'F.'", "takes \\*x: int"),
    "object": ("class A: pass\n\ndef f(x: A):\n    'F.'", "what JSON can't say"),
    "callable": ("from typing import Callable\n\ndef f(x: Callable[[], int]):\n    'F.'", "what JSON can't say"),
    "name": ("def grüsse(x: int):\n    'F.'", "a name that no tool can have"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_a_sentence(name: str, tmp_path: Path) -> None:
    file, (source, word) = tmp_path / "tools.py", WRONG[name]
    file.write_text(source)
    with pytest.raises(OperatorError, match=word) as refusal:
        read(file)
    assert str(file) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["nowhere.py", "tools.txt"])
def test_a_file_that_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "tools.txt").write_text("def f(): 'F.'")
    with pytest.raises(OperatorError, match="is not"):
        read(tmp_path / name)
