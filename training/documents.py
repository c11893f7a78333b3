"""Plain documents for training: the sources' text, one document per page or chapter."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .books import read_novels, read_scripture
from .html_text import html_to_text

# Folders of each manual that hold prose, and the pages wanted there. What repeats other pages
# (indexes, print versions, generated lists of trait implementations) is left out.
_MANUALS = {
    "python3.11-doc": ("usr/share/doc/python3.11/html", "tutorial howto library reference faq using", "*.html"),
    "sqlite3-doc": ("usr/share/doc/sqlite3", ".", "*.html"),
    "rust-doc": (
        "usr/share/doc/rust-doc/html",
        "book rust-by-example nomicon reference edition-guide std/fs std/io std/mem std/thread std/process std/env",
        "*.html",
    ),
    "golang-1.19-doc": ("usr/share/doc/golang-1.19-doc/html", ".", "*.html"),
    "postgresql-doc-15": ("usr/share/doc/postgresql-doc-15/html", ".", "*.html"),
    "python-django-doc": (
        "usr/share/doc/python-django-doc/html",
        "intro topics howto ref faq misc internals",
        "*.html",
    ),
    "python-sqlalchemy-doc": ("usr/share/doc/python-sqlalchemy-doc/html", "core orm tutorial faq dialects", "*.html"),
    "python-flask-doc": ("usr/share/doc/python-flask-doc/html", ".", "*.html"),
    "python-pandas-doc": ("usr/share/doc/python-pandas-doc/html", "user_guide getting_started development", "*.html"),
    "sphinx-doc": ("usr/share/doc/sphinx-doc/html", "usage development extdev internals tutorial man", "*.html"),
    "apache2-doc": ("usr/share/doc/apache2-doc/manual/en", ".", "*.html*"),
    "nodejs-doc": ("usr/share/doc/nodejs/api", ".", "*.html*"),
}
_UNWANTED = re.compile(
    r"(^|/)(print|index|genindex|contents|toc|bookindex|all|search|404|title-page|SUMMARY|release-.*|keyword.*|"
    r"(trait|struct|enum|union|type)\..*)\.html|(first|second|2018)-edition/|releaselog/|_modules/|changes.html"
)
_PLAIN = str.maketrans("‘’“”\u00a0", "''\"\" ")
_SHORTEST = 200  # characters; shorter pages are redirects and lists of links


@dataclass(frozen=True)
class Document:
    """``name`` is stable from run to run, so that the held-out part is always the same."""

    source: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """About one document in forty is never trained on."""
        return hashlib.sha256(f"{self.source}/{self.name}".encode()).digest()[0] < 6


def read_documents(folder: Path) -> Iterator[Document]:
    """All documents of all unpacked sources under ``folder``, in a fixed order, without repeated pages."""
    seen: set[str] = set()
    for source, name, text in _everything(folder):
        text = text.translate(_PLAIN)
        if len(text) >= _SHORTEST and text not in seen:
            seen.add(text)
            yield Document(source, name, text)


def _everything(folder: Path) -> Iterator[tuple[str, str, str]]:
    for source, (base, places, pattern) in _MANUALS.items():
        root = folder / source / base
        for place in places.split():
            for page in sorted((root / place).rglob(pattern)):
                name = str(page.relative_to(root))
                if not _UNWANTED.search(name):
                    yield source, name, html_to_text(_read(page))
    for name, text in read_novels(folder / "r-cran-janeaustenr"):
        yield "r-cran-janeaustenr", name, text
    for name, text in read_scripture(folder / "sword-text-web"):
        yield "sword-text-web", name, text


def _read(page: Path) -> str:
    raw = page.read_bytes()
    return (gzip.decompress(raw) if page.suffix == ".gz" else raw).decode("utf-8", "replace")
