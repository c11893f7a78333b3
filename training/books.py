"""Chapters of two packages that keep books in formats of their own: R's lazy-load tables and SWORD modules."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_R_STRING = 9  # CHARSXP: the low byte of an item's flags in R's serialisation
_CHAPTER = re.compile(r"\n(?=(?:CHAPTER|Chapter|VOLUME) +[IVXLC0-9]+)")


def read_novels(package: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every chapter in R's package ``janeaustenr``, hard line breaks undone."""
    data = package / "usr/lib/R/site-library/janeaustenr/data"
    table, novel = (data / "Rdata.rdb").read_bytes(), 0
    while table:
        novel += 1
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(table[4:]))  # 4 bytes of length, then the stream
        table = stream.unused_data
        for number, chapter in enumerate(_CHAPTER.split("\n".join(lines))):
            yield f"novel {novel}/{number}", _unwrap(chapter)


def _r_strings(data: bytes) -> list[str]:
    """All strings of an object in R's XDR serialisation, in order, other items skipped byte by byte."""
    strings, at = [], 0
    while at + 8 <= len(data):
        flags, length = struct.unpack_from(">Ii", data, at)
        if flags & 0xFFF00FFF == _R_STRING and 0 <= length <= len(data) - at - 8:
            strings.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        else:
            at += 1
    return strings


def _unwrap(text: str) -> str:
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    return "\n\n".join(p.replace("--", "—").replace("_", "") for p in paragraphs if p)


def read_scripture(package: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every chapter in a SWORD module of OSIS text, notes and verse numbers left out."""
    (module,) = (package / "usr/share/sword/modules/texts/ztext").iterdir()
    for part in ("ot", "nt"):
        index, blocks = (module / f"{part}.bzs").read_bytes(), (module / f"{part}.bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", index):
            if size:
                yield from _osis_chapters(zlib.decompress(blocks[start : start + size]).decode())


def _osis_chapters(osis: str) -> Iterator[tuple[str, str]]:
    osis = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", "", osis, flags=re.DOTALL)
    starts = list(re.finditer(r'<chapter [^>]*osisID="([^"]+)"[^>]*sID=[^>]*>', osis))
    ends = [match.start() for match in starts[1:]] + [len(osis)]
    for start, end in zip(starts, ends, strict=False):
        body = re.sub(r'<(?:div [^>]*type="x-p"|lg|l) ?[^>]*>', "\n", osis[start.end() : end])
        lines = (" ".join(line.split()) for line in re.sub(r"<[^>]+>", "", body).split("\n"))
        yield start.group(1), "\n".join(line for line in lines if line)
