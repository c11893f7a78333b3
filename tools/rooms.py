"""The server's rooms, drawn from what the code imports.

    python tools/rooms.py            writes the pictures into docs/architecture.md
    python tools/rooms.py --check    fails if those there are not today's, or if imports go round in a circle
    python tools/rooms.py --print    prints them

A room of a package is a folder or a file directly in it. A room's floor is the length of the longest way down from it,
so arrows go down; one that doesn't belongs to a circle. Imports for types alone (under `TYPE_CHECKING`) are no arrows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grimp

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/architecture.md"
SERVER = "warmkv_server"
PICTURES = {
    SERVER: "The server",
    f"{SERVER}.engine": "The engine",
    f"{SERVER}.kv": "The tiered store",
}
BEGIN, END = "<!-- rooms: begin -->", "<!-- rooms: end -->"
FEW = 16
"""Of more rooms a picture leaves out the arrows that follow from others; all of them nobody could follow."""


@dataclass(frozen=True)
class House:
    """Rooms, and for each the rooms that it imports from."""

    arrows: dict[str, frozenset[str]]

    @classmethod
    def of(cls, imports: grimp.ImportGraph, package: str) -> House:
        rooms = sorted(imports.find_children(package))
        room_of = {module: room for room in rooms for module in {room, *imports.find_descendants(room)}}
        arrows: dict[str, set[str]] = {_name(room): set() for room in rooms}
        for module, room in room_of.items():
            for imported in imports.find_modules_directly_imported_by(module):
                other = room_of.get(imported, room)
                if other != room:
                    arrows[_name(room)].add(_name(other))
        return cls({room: frozenset(others) for room, others in arrows.items()})

    def below(self, room: str) -> set[str]:
        """All rooms that can be reached from one; itself among them if it is in a circle."""
        found: set[str] = set()
        ahead = list(self.arrows[room])
        while ahead:
            if (next_room := ahead.pop()) not in found:
                found.add(next_room)
                ahead.extend(self.arrows[next_room])
        return found

    def circles(self) -> list[tuple[str, ...]]:
        """Rooms that reach each other."""
        below = {room: self.below(room) for room in self.arrows}
        inside = [room for room in self.arrows if room in below[room]]
        return sorted({tuple(sorted(other for other in below[room] if room in below[other])) for room in inside})

    def floors(self) -> dict[str, int]:
        """The floor of each room, from 0; rooms of one circle share one."""
        one_of = {room: min(circle) for circle in self.circles() for room in circle}
        floors: dict[str, int] = {}

        def floor(room: str) -> int:
            """Of a room that stands for its circle."""
            if room not in floors:
                together = [each for each in self.arrows if one_of.get(each, each) == room]
                others = {one_of.get(other, other) for each in together for other in self.arrows[each]} - {room}
                floors[room] = 1 + max((floor(other) for other in others), default=-1)
            return floors[room]

        return {room: floor(one_of.get(room, room)) for room in self.arrows}

    def upward(self) -> list[tuple[str, str]]:
        """Arrows that don't go down: those inside of circles."""
        floors = self.floors()
        return [(room, other) for room, other in self.pairs() if floors[other] >= floors[room]]

    def pairs(self) -> Iterator[tuple[str, str]]:
        for room, others in self.arrows.items():
            for other in sorted(others):
                yield room, other

    def told(self) -> str:
        """The counts."""
        floors = max(self.floors().values()) + 1
        return (
            f"rooms {len(self.arrows)}, floors {floors}, arrows {len(list(self.pairs()))}, "
            f"arrows up {len(self.upward())}, circles {len(self.circles())}"
        )

    def mermaid(self) -> str:
        """A picture, the highest floor first."""
        floors = self.floors()
        ordered = sorted(self.arrows, key=lambda room: (-floors[room], room))
        shown = [pair for pair in self.pairs() if len(self.arrows) <= FEW or not self._follows(*pair)]
        lines = ["flowchart TD", *(f"    {_node(room)}" for room in ordered)]
        for room in ordered:
            lines += [f"    {_id(room)} --> {_id(other)}" for begin, other in shown if begin == room]
        return "\n".join(lines)

    def _follows(self, room: str, other: str) -> bool:
        return any(other in self.below(between) for between in self.arrows[room] - {other})


def _name(module: str) -> str:
    return module.rpartition(".")[2]


def _id(room: str) -> str:
    """Some names, such as `end`, mean something to mermaid."""
    return f"room_{room}"


def _node(room: str) -> str:
    return f"{_id(room)}[{room}]"


def houses() -> dict[str, House]:
    """Of each picture's package."""
    imports = grimp.build_graph(SERVER, exclude_type_checking_imports=True, cache_dir=None)
    return {package: House.of(imports, package) for package in PICTURES}


def drawn(built: dict[str, House]) -> str:
    """What stands between the marks."""
    parts = []
    for package, title in PICTURES.items():
        house = built[package]
        left_out = " Arrows that follow from others are left out." if len(house.arrows) > FEW else ""
        parts.append(f"### {title}\n\n`{package}`: {house.told()}.{left_out}\n\n```mermaid\n{house.mermaid()}\n```")
    return "\n\n".join(parts)


def replaced(document: str, picture: str) -> str:
    """The document with the picture between its marks.

    Raises:
        ValueError: the marks are not there, once each.
    """
    marks = re.compile(rf"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(marks.findall(document)) != 1:
        raise ValueError(f"the document needs {BEGIN} and {END}, once each")
    return marks.sub(lambda _: f"{BEGIN}\n\n{picture}\n\n{END}", document)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; fail on any difference, or a circle")
    parser.add_argument("--print", action="store_true", help="only print")
    given = parser.parse_args()
    built = houses()
    if given.print:
        print(drawn(built))
        return 0
    document = DOCUMENT.read_text()
    wanted = replaced(document, drawn(built))
    if not given.check:
        DOCUMENT.write_text(wanted)
    problems = [
        f"{package}: {' > '.join(circle)} import each other in a circle"
        for package, house in built.items()
        for circle in house.circles()
    ]
    if given.check and wanted != document:
        problems.append("docs/architecture.md shows other rooms than the code has; run `make draw-rooms`")
    for problem in problems:
        print(problem, file=sys.stderr)
    for package, house in built.items():
        print(f"{package}: {house.told()}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
