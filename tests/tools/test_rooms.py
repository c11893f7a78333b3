"""How rooms are counted and drawn, on a package made for it."""

from __future__ import annotations

import sys
from pathlib import Path

import grimp
import pytest

from tools.rooms import BEGIN, END, FEW, House, replaced

FILES = {
    "door.py": "from house.kitchen import stove",
    "kitchen/__init__.py": "",
    "kitchen/stove.py": "from house.cellar import wood\nfrom house.kitchen import pan",
    "kitchen/pan.py": "",
    "cellar/__init__.py": "",
    "cellar/wood.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house import door",
}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    for name, text in {"__init__.py": "", **FILES}.items():
        path = tmp_path / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    imports = grimp.build_graph("house", exclude_type_checking_imports=True, cache_dir=None)
    sys.modules.pop("house", None)
    return House.of(imports, "house")


def test_a_folder_is_one_room_and_types_are_no_arrows(house: House) -> None:
    assert house.arrows == {"door": {"kitchen"}, "kitchen": {"cellar"}, "cellar": frozenset()}
    assert house.floors() == {"door": 2, "kitchen": 1, "cellar": 0}
    assert house.told() == "rooms 3, floors 3, arrows 2, arrows up 0, circles 0"


def test_highest_floor_is_drawn_first(house: House) -> None:
    assert house.mermaid().splitlines() == [
        "flowchart TD",
        "    room_door[door]",
        "    room_kitchen[kitchen]",
        "    room_cellar[cellar]",
        "    room_door --> room_kitchen",
        "    room_kitchen --> room_cellar",
    ]


def test_rooms_that_reach_each_other_are_a_circle_on_one_floor() -> None:
    house = _house({"a": "b", "b": "c", "c": "bd", "d": ""})
    assert house.circles() == [("b", "c")]
    assert house.floors() == {"a": 2, "b": 1, "c": 1, "d": 0}
    assert set(house.upward()) == {("b", "c"), ("c", "b")}


def test_arrows_that_follow_are_left_out_of_large_pictures_alone() -> None:
    rooms = "abcdefghijklmnopqrstuvwxyz"
    small = _house({"a": "bc", "b": "c", "c": ""})
    assert small.mermaid().count("-->") == 3
    large = _house({room: rooms[number + 1 : FEW + 1] for number, room in enumerate(rooms[: FEW + 1])})
    assert large.mermaid().count("-->") == FEW


def test_only_what_is_between_the_marks_changes() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replaced(document, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert replaced(replaced(document, "new"), "new") == replaced(document, "new")
    with pytest.raises(ValueError, match="once each"):
        replaced("no marks", "new")


def _house(arrows: dict[str, str]) -> House:
    return House({room: frozenset(others) for room, others in arrows.items()})
