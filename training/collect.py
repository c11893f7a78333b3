"""Gather everything the training text is made of into one file, so that the rest needs no packages and no network."""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict, dataclass
from pathlib import Path

from .documents import Document, read_documents
from .facts import Call, Country, Element, read_calls, read_countries, read_elements
from .words import Word, read_words

_WORDS = 16_000


@dataclass
class Collection:
    """What was collected."""

    documents: list[Document]
    words: list[Word]
    countries: list[Country]
    elements: list[Element]
    calls: list[Call]


def collect(sources: Path) -> Collection:
    """Read the unpacked packages under ``sources``."""
    documents = list(read_documents(sources))
    return Collection(
        documents,
        read_words(sources / "wordnet-base", _WORDS),
        read_countries(sources / "countries-list"),
        read_elements(sources / "dict-elements"),
        list(read_calls(documents)),
    )


def save(collection: Collection, path: Path) -> None:
    """Write one compressed JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(json.dumps(asdict(collection), ensure_ascii=False).encode(), preset=6))


def load(path: Path) -> Collection:
    """Read what ``save`` wrote."""
    data = json.loads(lzma.decompress(path.read_bytes()))
    return Collection(
        [Document(**row) for row in data["documents"]],
        [Word(**row) for row in data["words"]],
        [Country(**row) for row in data["countries"]],
        [Element(**row) for row in data["elements"]],
        [Call(**row) for row in data["calls"]],
    )
