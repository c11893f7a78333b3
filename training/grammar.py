"""Conversations written by hand as small grammars: `texts/*.txt`.

A file holds tables and scenes, separated by blank lines; `#` starts a comment line.

    @pet sound: cat, meow | dog, woof           a table: its name and first column, further columns, rows

    ~ You are a vet.                            a scene: system text (may be absent),
    > My {pet} is ill. / My {pet} is sick.      what the user may say,
    < [Oh no|I'm sorry]! Poor {pet}.            what the assistant may answer,
    > What does it say?                         and further turns.
    < It says {pet.sound}.

`{pet}` is the first column of a row drawn once for a scene, `{pet2}` of another row; `{a pet}` has its article,
`{Pet}` a capital, `{pet}s` is the plural. `[x|y]` is a choice, `\\n` a line break, ` / ` separates alternatives.
A table's columns are separated by `, `; inside a column `;` stands for a comma.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

Message = tuple[str, str]  # role, text
_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
_SLOT = re.compile(r"\{(a |A )?(\w+?)(\d?)(?:\.(\w+))?\}(s\b)?")
_IRREGULAR = {
    "mouse": "mice",
    "sheep": "sheep",
    "deer": "deer",
    "wolf": "wolves",
    "knife": "knives",
    "mango": "mangoes",
}


@dataclass
class Table:
    """Rows of strings under named columns."""

    columns: list[str]
    rows: list[list[str]]


@dataclass
class Scene:
    """Alternative system texts, then turns: (what the user may say, what the assistant may answer)."""

    system: list[str] = field(default_factory=list)
    turns: list[tuple[list[str], list[str]]] = field(default_factory=list)


@dataclass
class Grammar:
    """What the files can say: tables, shared by all, and each file's scenes under its name without the suffix."""

    tables: dict[str, Table] = field(default_factory=dict)
    scenes: dict[str, list[Scene]] = field(default_factory=dict)

    def play(self, scene: Scene, rng: Random) -> list[Message]:
        """One conversation: choices made and slots filled at random, a slot the same in the whole scene."""
        drawn: dict[str, list[str]] = {}
        said: list[Message] = []
        if scene.system:
            said.append(("system", self.fill(rng.choice(scene.system), rng, drawn)))
        for user, assistant in scene.turns:
            said.append(("user", self.fill(rng.choice(user), rng, drawn)))
            said.append(("assistant", self.fill(rng.choice(assistant), rng, drawn)))
        return said

    def fill(self, text: str, rng: Random, drawn: dict[str, list[str]]) -> str:
        """``text`` with its choices made and its slots filled; ``drawn`` remembers the rows.

        Raises:
            KeyError: the text names a table or a column that does not exist.
        """
        while choice := _CHOICE.search(text):
            text = text[: choice.start()] + rng.choice(choice.group(1).split("|")) + text[choice.end() :]
        return _SLOT.sub(lambda slot: self._slot(slot, rng, drawn), text).replace("\\n", "\n")

    def _slot(self, slot: re.Match[str], rng: Random, drawn: dict[str, list[str]]) -> str:
        article, name, number, column, many = slot.groups()
        table = self.tables[name.lower()]
        key = name.lower() + number
        if key not in drawn:
            taken = [row for other, row in drawn.items() if other.rstrip("0123456789") == name.lower()]
            drawn[key] = rng.choice([row for row in table.rows if row not in taken])
        word = drawn[key][table.columns.index(column.lower()) if column else 0]
        if many:
            word = plural(word)
        if article:
            word = ("an " if word[0] in "aeiouAEIOU" else "a ") + word
        capital = (column or name)[0].isupper() or article == "A "
        return word[0].upper() + word[1:] if capital else word


def ask(question: str, answer: str) -> list[Message]:
    """One turn of each side."""
    return [("user", question), ("assistant", answer)]


def plural(word: str) -> str:
    """The plural of an English noun, by rule where it is regular."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word[-1] == "y" and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def read_grammar(paths: Iterable[Path]) -> Grammar:
    """Read the files.

    Raises:
        ValueError: a line belongs to no table and no scene, or a row has not as many values as its table columns.
    """
    grammar = Grammar()
    for path in paths:
        scenes = grammar.scenes.setdefault(path.stem, [])
        for block in re.split(r"\n\s*\n", path.read_text()):
            lines = [line for line in block.splitlines() if line and not line.startswith("#")]
            scene = Scene()
            for line in lines:
                _read_line(line, grammar, scene)
            if scene.turns:
                scenes.append(scene)
    return grammar


def _read_line(line: str, grammar: Grammar, scene: Scene) -> None:
    mark, _, text = line.partition(" ")
    if line.startswith("@"):
        head, _, rows = line[1:].partition(": ")
        name, *columns = head.split()
        table = grammar.tables.setdefault(name, Table([name, *columns], []))
        for row in rows.split(" | "):
            values = [value.replace(";", ",") for value in row.strip().split(", ")]
            if len(values) != len(table.columns):
                raise ValueError(f"table {name} has the columns {table.columns}, not so the row {row!r}")
            table.rows.append(values)
    elif mark == "~":
        scene.system.extend(text.split(" / "))
    elif mark == ">":
        if not scene.turns or scene.turns[-1][1]:
            scene.turns.append(([], []))
        scene.turns[-1][0].extend(text.split(" / "))
    elif mark == "<" and scene.turns:
        scene.turns[-1][1].append(text)
    else:
        raise ValueError(f"neither a table nor a part of a scene: {line!r}")
