"""The built-in tokenizer, and others made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from warmkv_server.engine.model.load import BUILT_IN


@cache
def built_in() -> TokenizerWrapper:
    return _load(BUILT_IN / "tiny")


def variant(
    folder: Path,
    *,
    special: Sequence[str] = (),
    decoder: Mapping[str, Any] | None = None,
    eos: str | None = None,
    bare: bool = False,
    changes: Mapping[str, Any] | None = None,
    **config: Any,
) -> TokenizerWrapper:
    """The built-in tokenizer with other special tokens, another decoder or another configuration.

    Args:
        folder: an empty one, to write it to.
        special: tokens to add.
        decoder: as tokenizer.json has it.
        eos: the end of sequence, if it is another.
        bare: without a beginning of text.
        changes: other parts of tokenizer.json.
        config: of tokenizer_config.json.
    """
    source = BUILT_IN / "tiny"
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    first = max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])) + 1
    known = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": first + n, "content": text, **known} for n, text in enumerate(special)]
    if decoder is not None:
        tokenizer["decoder"] = decoder
    if bare:
        tokenizer["post_processor"] = None
    tokenizer |= changes or {}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    if eos is not None:
        settings["eos_token"] = eos
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    (folder / "config.json").write_text((source / "config.json").read_text())
    return _load(folder)


def ids(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """The text's tokens alone."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def _load(folder: Path) -> TokenizerWrapper:
    tokenizer: TokenizerWrapper = load_tokenizer(folder)
    return tokenizer
