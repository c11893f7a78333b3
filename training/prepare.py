"""Token streams for training: documents, short conversations, long conversations; and what is held out.

Everything is drawn from seeds, in shards that are made side by side, so that the streams depend on nothing but the
collection, the tokenizer and `Sizes`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .collect import Collection
from .documents import Document
from .grammar import Message
from .talks import Talks
from .tokenizer import ASSISTANT_ID, BOS_ID, END_ID, SYSTEM_ID, USER_ID

Tokens = npt.NDArray[np.uint16]
_ROLES = {"system": SYSTEM_ID, "user": USER_ID, "assistant": ASSISTANT_ID}
_SHARDS = 64
_SHELF = 120_000  # characters of neighbouring documents read as one


@dataclass(frozen=True)
class Sizes:
    """How much conversation to make, in characters. The documents are what they are."""

    short: int = 130_000_000
    facts: int = 40_000_000
    medium: int = 50_000_000  # conversations of 2,000 to 20,000 characters
    long: int = 50_000_000  # conversations of 20,000 to 120,000 characters


@dataclass
class Stream:
    """Documents one after another. ``starts`` are the positions of their first tokens."""

    tokens: Tokens
    starts: npt.NDArray[np.int64]


def prepare(data: Collection, tokenizer: Tokenizer, sizes: Sizes, folder: Path) -> None:
    """Write one `NAME.npz` for each stream into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = [d for d in data.documents if not d.held_out]
    held_out = [d for d in data.documents if d.held_out]
    pages = list(trained)
    Random("pages").shuffle(pages)
    _save(folder / "documents.npz", _encode_texts(tokenizer, (d.text for d in pages)))
    _save(folder / "shelves.npz", _encode_texts(tokenizer, _shelves(trained)))
    _save(folder / "held_out_documents.npz", _encode_texts(tokenizer, (d.text for d in held_out)))
    maker = _Maker(data, tokenizer)
    for kind, characters in (
        ("short", sizes.short),
        ("facts", sizes.facts),
        ("medium", sizes.medium),
        ("long", sizes.long),
    ):
        _save(folder / f"{kind}.npz", maker.stream(kind, characters))
    _save(folder / "held_out_short.npz", maker.shard("short", 0, min(sizes.short, 1_000_000), seed="held out"))


def load(path: Path) -> Stream:
    """Read a stream that ``prepare`` wrote."""
    with np.load(path) as file:
        return Stream(file["tokens"], file["starts"])


def encode_talk(tokenizer: Tokenizer, said: list[Message]) -> list[int]:
    """Token ids of a conversation, as the chat template renders it."""
    ids = [BOS_ID]
    for role, text in said:
        ids += [_ROLES[role], *tokenizer.encode(text, add_special_tokens=False).ids, END_ID]
    return ids


class _Maker:
    """Makes conversations in parallel; the children inherit the collection by fork."""

    def __init__(self, data: Collection, tokenizer: Tokenizer) -> None:
        self._talks = Talks(data)
        self._tokenizer = tokenizer

    def stream(self, kind: str, characters: int) -> Stream:
        shards = _SHARDS if characters > 1_000_000 else 1
        jobs = [(kind, number, characters // shards) for number in range(shards)]
        if shards == 1:
            return _join([self.shard(*job) for job in jobs])
        with multiprocessing.get_context("fork").Pool() as pool:
            return _join(pool.starmap(self.shard, jobs))

    def shard(self, kind: str, number: int, characters: int, seed: str = "training") -> Stream:
        rng = Random(f"{seed} {kind} {number}")
        made, talks = 0, []
        while made < characters:
            said = self._talk(kind, rng)
            made += sum(len(text) for _, text in said)
            talks.append(encode_talk(self._tokenizer, said))
        return _stream(talks)

    def _talk(self, kind: str, rng: Random) -> list[Message]:
        if kind == "short":
            return self._talks.short(rng)
        if kind == "facts":
            return self._talks.facts(rng)
        shortest, longest = (2_000, 20_000) if kind == "medium" else (20_000, 120_000)
        make = self._talks.long if rng.random() < 0.7 else self._talks.needles
        return make(rng, rng.randint(shortest, longest))


def _shelves(documents: Iterable[Document]) -> Iterator[str]:
    """Neighbouring documents of a source joined into long ones, for training at long lengths."""
    shelf: list[Document] = []
    for document in documents:
        if shelf and (document.source != shelf[0].source or sum(len(d.text) for d in shelf) > _SHELF):
            yield "\n\n".join(d.text for d in shelf)
            shelf = []
        shelf.append(document)
    yield "\n\n".join(d.text for d in shelf)


def _encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> Stream:
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return _stream([[BOS_ID, *one.ids, END_ID] for one in encoded])


def _stream(documents: list[list[int]]) -> Stream:
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    tokens = np.fromiter((token for ids in documents for token in ids), dtype=np.uint16, count=int(lengths.sum()))
    return Stream(tokens, np.cumsum(lengths) - lengths)


def _join(streams: list[Stream]) -> Stream:
    offsets = np.cumsum([0] + [len(s.tokens) for s in streams[:-1]])
    starts = [s.starts + offset for s, offset in zip(streams, offsets, strict=True)]
    return Stream(np.concatenate([s.tokens for s in streams]), np.concatenate(starts))


def _save(path: Path, stream: Stream) -> None:
    np.savez_compressed(path, tokens=stream.tokens, starts=stream.starts)
