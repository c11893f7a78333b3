"""Small tables of facts: countries, chemical elements, and what functions and commands of the manuals do."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .documents import Document

_LAST_ELEMENT = 100  # the package's notes on heavier ones come from another work
_COMMAND = re.compile(r"([A-Z ]+)\n\n\1 — ([^\n]+)")
_CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


@dataclass
class Country:
    """Names in English. ``well_known``: most people could be asked about it."""

    name: str
    capital: str
    continent: str
    currency: str
    well_known: bool


@dataclass
class Element:
    """``note`` is one or two sentences."""

    name: str
    symbol: str
    number: int
    note: str


@dataclass
class Call:
    """A function or command, which manual it is from, and the first sentence about it."""

    name: str
    manual: str  # "Python", "PostgreSQL"
    does: str


def read_countries(package: Path) -> list[Country]:
    """All countries that have a capital."""
    rows = json.loads((package / "package/countries.min.json").read_text())
    currencies = json.loads((package / "package/currencies.min.json").read_text())
    known = frozenset(Path(__file__).with_name("known_countries.txt").read_text().splitlines())
    return [
        Country(
            name=row["name"],
            capital=row["capital"],
            continent=_CONTINENTS[row["continent"]],
            currency=currencies[row["currency"][0]]["name"],
            well_known=row["name"] in known,
        )
        for _, row in sorted(rows.items())
        if row["capital"] and row["currency"] and row["currency"][0] in currencies
    ]


def read_elements(package: Path) -> list[Element]:
    """The first hundred elements."""
    text = gzip.decompress((package / "usr/share/dictd/elements.dict.dz").read_bytes()).decode("utf-8", "replace")
    found = re.findall(
        r"^([a-z]+)\nSymbol: (\w+)\nAtomic number: (\d+)\nAtomic weight: [^\n]*\n(.*?)(?=\n\n|\Z)",
        text,
        re.MULTILINE | re.DOTALL,
    )
    return [
        Element(name, symbol, int(number), " ".join(note.split()))
        for name, symbol, number, note in found
        if int(number) <= _LAST_ELEMENT
    ]


def read_calls(documents: Iterable[Document]) -> Iterator[Call]:
    """Functions of Python's library and commands of PostgreSQL that the manuals describe in a sentence."""
    for document in documents:
        if document.held_out:
            continue
        if document.source == "python3.11-doc" and document.name.startswith("library/"):
            yield from _python_calls(document.text, builtins=document.name.endswith("/functions.html"))
        elif document.name.startswith("sql-") and (match := _COMMAND.match(document.text)):
            yield Call(match[1], "PostgreSQL", match[2].rstrip(".") + ".")


def _python_calls(text: str, builtins: bool) -> Iterator[Call]:
    """Names without a dot are ambiguous (`start`, `release`) unless they are built in."""
    for match in re.finditer(r"^ ?([a-z][\w.]*)\([^\n]*\)[^\n]*\n\n([A-Z][^\n]{20,})", text, re.MULTILINE):
        sentence = re.split(r"(?<=[a-z)])\. ", match[2])[0].rstrip(".:")
        if len(sentence) < 160 and ("." in match[1] or builtins):
            yield Call(match[1], "Python", sentence + ".")
