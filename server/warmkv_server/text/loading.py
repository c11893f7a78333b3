"""A folder's tokenizer, set right where its files contradict themselves or what loads them doesn't understand them."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from warmkv_server.text.token_bytes import members

log = logging.getLogger(__name__)


def load(
    folder: Path,
    chat_template: str | None = None,
    eos_token_ids: Sequence[int] | None = None,
    defaults: dict[str, Any] | None = None,
) -> TokenizerWrapper:
    """The tokenizer, as transformers makes it of the folder.

    Where it can't (a class that nobody has, a config.json that it doesn't know), tokenizer.json alone says what it is.

    Args:
        chat_template: instead of the folder's own.
        eos_token_ids: those that end an answer.
        defaults: of the model's class, for checkpoints without settings of their own.

    Raises:
        Exception: whatever transformers does.
    """
    settings: dict[str, Any] = {"trust_remote_code": False}
    try:
        tokenizer = tokenizer_utils.load(folder, settings, eos_token_ids=eos_token_ids, defaults=defaults)
    except Exception as error:
        if not (folder / "tokenizer.json").is_file():
            raise
        tokenizer = _by_itself(folder, settings, eos_token_ids, defaults)
        log.warning("the tokenizer is what tokenizer.json alone says: %s", " ".join(str(error).split())[:200])
    if chat_template is not None:
        tokenizer._tokenizer.chat_template = chat_template
        tokenizer._chat_template = None  # which mlx-lm brings for some classes, as a function
        tokenizer.has_chat_template = True
    _repair_decoder(tokenizer)
    return tokenizer


def template_of(tokenizer: TokenizerWrapper) -> str | dict[str, str] | None:
    """Its chat template: one text, several by name, or where mlx-lm brings it as a function, the module of that."""
    function = tokenizer._chat_template
    found: str | dict[str, str] | None = (
        tokenizer.chat_template if function is None else {"mlx-lm": function.__module__}
    )
    return found


def _by_itself(
    folder: Path, settings: dict[str, Any], eos_token_ids: Sequence[int] | None, defaults: dict[str, Any] | None
) -> TokenizerWrapper:
    """The tokenizer of a copy of the folder that names no class but the general one, and no model."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    config = {name: value for name, value in config.items() if name != "auto_map"}
    with tempfile.TemporaryDirectory(prefix="warmkv-tokenizer-") as name:
        staged = Path(name)
        (staged / path.name).write_text(json.dumps(config | {"tokenizer_class": PreTrainedTokenizerFast.__name__}))
        (staged / "config.json").write_text("{}")
        for found in (*folder.glob("*.jinja"), folder / "tokenizer.json", folder / "special_tokens_map.json"):
            if found.is_file():
                (staged / found.name).symlink_to(found.resolve())
        return tokenizer_utils.load(staged, settings, eos_token_ids=eos_token_ids, defaults=defaults)


def _repair_decoder(tokenizer: TokenizerWrapper) -> None:
    """A vocabulary of bytes, each written as a letter, is decoded as one: some files bring SentencePiece's decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    parts = json.loads(backend.to_str())
    cuts = {part["type"] for part in members(parts["pre_tokenizer"], "pretokenizers")}
    spells = {part["type"] for part in members(parts["decoder"], "decoders")}
    if "ByteLevel" in cuts and "ByteLevel" not in spells:
        log.warning("the tokenizer cuts text into bytes and has no decoder for them; it is given one")
        backend.decoder = decoders.ByteLevel()
