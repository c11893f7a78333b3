"""Common English words with their meanings, out of WordNet's database files (format: `man 5 wndb`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
_UNFIT = re.compile(
    r"\b(offensive|slur|obscene|vulgar|disparaging|ethnic|sexual\w*|genital\w*|penis|vagina|intercourse|prostitut\w*|"
    r"semen|vulva|copulat\w*|erotic|orgasm\w*|fornicat\w*|rape|torture|feces|excrement|urin\w+|nazi)\b",
    re.IGNORECASE,
)


@dataclass
class Word:
    """The most used meaning of a word. ``count`` is how often WordNet's tagged texts use it."""

    word: str
    part: str  # noun, verb, adj, adv
    meaning: str
    count: int
    examples: list[str] = field(default_factory=list)
    synonyms: list[str] = field(default_factory=list)
    opposites: list[str] = field(default_factory=list)
    kinds_of: list[str] = field(default_factory=list)  # more general words


@dataclass
class _Synset:
    lemmas: list[str]
    pointers: list[tuple[str, str]]  # (relation, offset of a synset of the same part of speech)
    gloss: str


def read_words(package: Path, most: int) -> list[Word]:
    """The ``most`` used words, most used first; names, slurs and words about sex left out."""
    folder = package / "usr/share/wordnet"
    counts = _read_counts(folder)
    words: list[Word] = []
    for part, letter in _PARTS.items():
        synsets = _read_synsets(folder / f"data.{part}")
        for lemma, offset in _read_index(folder / f"index.{part}"):
            synset = synsets[offset]
            word = lemma.replace("_", " ")
            proper = any(other.lower() == lemma and other != lemma for other in synset.lemmas)
            if not proper and not _UNFIT.search(synset.gloss) and re.fullmatch(r"[a-z]+( [a-z]+)?", word):
                words.append(_word(word, part, synset, synsets, counts.get((lemma, letter), 0)))
    words.sort(key=lambda word: (-word.count, word.word, word.part))
    unique = {word.word: word for word in reversed(words)}  # of several parts of speech, the most used
    return sorted(unique.values(), key=lambda word: (-word.count, word.word))[:most]


def _word(word: str, part: str, synset: _Synset, synsets: dict[str, _Synset], count: int) -> Word:
    examples = [e.strip() for e in re.findall(r'"([^"]+)"', synset.gloss)]
    meaning = re.sub(r'[;:]? *"[^"]*"(?: *- [^;]*)?', "", synset.gloss)
    meaning = re.sub(r"\([^)]*\) ?", "", meaning).strip(" ;:,")
    others: dict[str, list[str]] = {"!": [], "@": []}
    for relation, offset in synset.pointers:
        if relation in others and offset in synsets:
            others[relation].append(synsets[offset].lemmas[0].replace("_", " "))
    synonyms = [lemma.replace("_", " ") for lemma in synset.lemmas if lemma.lower().replace("_", " ") != word]
    return Word(word, part, meaning, count, examples, synonyms, others["!"], others["@"])


def _read_counts(folder: Path) -> dict[tuple[str, str], int]:
    letters = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
    counts: dict[tuple[str, str], int] = {}
    for line in (folder / "cntlist.rev").read_text("latin-1").splitlines():
        key, _, count = line.split()
        lemma, _, sense = key.partition("%")
        counts[lemma, letters[sense[0]]] = counts.get((lemma, letters[sense[0]]), 0) + int(count)
    return counts


def _read_index(path: Path) -> Iterator[tuple[str, str]]:
    """(lemma, offset of its first synset): WordNet lists the most used meaning first."""
    for line in path.read_text("latin-1").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            pointers = int(fields[3])
            yield fields[0], fields[4 + pointers + 2]


def _read_synsets(path: Path) -> dict[str, _Synset]:
    synsets = {}
    for line in path.read_text("latin-1").splitlines():
        if line.startswith(" "):
            continue
        data, _, gloss = line.partition("|")
        fields = data.split()
        words = int(fields[3], 16)
        lemmas = [re.sub(r"\(.*\)$", "", word) for word in fields[4 : 4 + 2 * words : 2]]
        at = 4 + 2 * words
        pointers = [
            (fields[i], fields[i + 1])
            for i in range(at + 1, at + 1 + 4 * int(fields[at]), 4)
            if fields[i + 2] == fields[2]
        ]
        synsets[fields[0]] = _Synset(lemmas, pointers, gloss.strip())
    return synsets
