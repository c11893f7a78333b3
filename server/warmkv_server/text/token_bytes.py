"""How much text one token can stand for, so that a text that is too long is known as such before it is tokenised."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper  # imports MLX


_SHRINKS = {"NFC": 4, "NFD": 2, "Replace": 1, "Prepend": 1}
"""Normalisers that drop nothing, and how many bytes of the text may become one of what is tokenised. Composing takes
three bytes into one at most, and characters with another canonical form lose a quarter before."""

_KEEPING = ("ByteLevel", "Digits", "Metaspace", "Split", "Punctuation", "UnicodeScripts")
"""What cuts the text into pieces and drops nothing, unless it is told to."""


def most_bytes_per_token(tokenizer: TokenizerWrapper) -> int:
    """Bytes of UTF-8 that one token stands for at most; 0 if a token may stand for any number of them.

    That is so where the tokenizer can drop a part of the text (white space, accents), or puts one token in the place
    of a whole run that it doesn't know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return 0
    parts: Mapping[str, Any] = json.loads(backend.to_str())
    model = parts["model"]
    pieces = list(members(parts["pre_tokenizer"], "pretokenizers"))
    by_bytes = any(piece["type"] == "ByteLevel" for piece in pieces)
    letters = sum(len(word) == 1 for word in model["vocab"])
    known = letters >= 256 if by_bytes else model.get("byte_fallback") and _has_bytes(model["vocab"])
    drops = any(piece["type"] not in _KEEPING or piece.get("behavior") == "Removed" for piece in pieces)
    if model.get("type") != "BPE" or drops or not known:
        return 0
    if any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"]):
        return 0
    shrinks = 1
    for normaliser in members(parts["normalizer"], "normalizers"):
        if normaliser["type"] not in _SHRINKS or (normaliser["type"] == "Replace" and not _grows(normaliser)):
            return 0
        shrinks *= _SHRINKS[normaliser["type"]]
    # In a vocabulary of bytes each byte is a character; elsewhere the words are written as they are.
    longest = max(len(word) if by_bytes else len(word.encode()) for word in model["vocab"])
    added = max((len(token["content"].encode()) for token in parts["added_tokens"]), default=1)
    return max(longest, added) * shrinks


def members(part: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    """A part of tokenizer.json, or the parts that it is a sequence of."""
    if part is None:
        return
    for member in part.get(name, [part]):
        if name in member:
            yield from members(member, name)
        else:
            yield member


def _has_bytes(vocabulary: Mapping[str, int]) -> bool:
    return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))


def _grows(replace: Mapping[str, Any]) -> bool:
    """Whether what is replaced, such as a space, is no longer than what comes in its place."""
    pattern = replace["pattern"].get("String")
    return pattern is not None and len(pattern.encode()) <= len(replace["content"].encode())
