"""Which tokens end an answer, and who says so."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warmkv_server.contract.model import End, EndSource
from warmkv_server.engine.model import closing_mark
from warmkv_server.engine.model.config_norms import text_config
from warmkv_server.errors import OperatorError

log = logging.getLogger(__name__)

_PROBE_SECONDS = 30.0
"""Longest time for a chat template to write two messages."""


def find(folder: Path, config: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> tuple[End, ...]:
    """The tokens that end an answer, by ascending id.

    generation_config.json says which; if it doesn't, config.json does, or its text_config. The tokenizer's `eos_token`
    is one besides, and so is the mark that the chat template writes behind an answer.

    Args:
        folder: of the model; one without generation_config.json says nothing there.
        config: as mlx-lm reads it.
        tokenizer: mlx-lm's, which may have defaults of the model's class.
        vocab_size: ids at or above are never sampled.

    Raises:
        OperatorError: for what can't be an id.
    """
    said: list[tuple[EndSource, list[int]]] = []
    path = folder / "generation_config.json"
    if generation := _ids(_json(path).get("eos_token_id"), path):
        said.append((EndSource.GENERATION_CONFIG, generation))
    else:
        own = _raw(folder, config)
        told = own.get("eos_token_id")
        ids = _ids(text_config(own).get("eos_token_id") if told is None else told, folder / "config.json")
        # Else what mlx-lm's class for the model has.
        said.append((EndSource.CONFIG, ids or sorted(set(tokenizer.eos_token_ids) - {tokenizer.eos_token_id})))
    said.append((EndSource.TOKENIZER, _ids(tokenizer.eos_token_id, folder / "tokenizer_config.json")))
    known = {token for _, ids in said for token in ids}
    if (mark := _template_end(tokenizer, known)) is not None:
        said.append((EndSource.CHAT_TEMPLATE, [mark]))
    sources: dict[int, tuple[EndSource, ...]] = {}
    for source, ids in said:
        for token in ids:
            if 0 <= token < vocab_size:
                sources[token] = (*sources.get(token, ()), source)
    if not sources:
        log.warning("no token ends an answer of this model: nothing names one; answers go on to max_tokens")
    names = {token: text for text, token in tokenizer.get_vocab().items()}
    return tuple(End(token, names.get(token, ""), by) for token, by in sorted(sources.items()))


def _raw(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json itself where there is one: mlx-lm's reading has generation_config's ids in it."""
    return _json(folder / "config.json") or config


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise OperatorError(f"{path} is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _ids(value: Any, path: Path) -> list[int]:
    """One id, a list of them, or nothing. 0 is an id."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for each in ids:
        if not isinstance(each, int) or isinstance(each, bool):
            raise OperatorError(f"eos_token_id is {value!r} in {path}; it must be a token id or a list of them")
    return list(ids)


def _template_end(tokenizer: Any, known: set[int]) -> int | None:
    """The token that the chat template writes behind an answer, where it is none that is known.

    The first mark behind the last message of a conversation counts: that of gpt-oss is known, and the one that it
    writes between two messages ends no answer.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str) or any(mark and mark in template for mark in map(tokenizer.decode, known)):
        return None
    behind = _behind_an_answer(template, dict(tokenizer.special_tokens_map))
    marks = {text: token for text, token in tokenizer.get_added_vocab().items() if text.strip()}
    if behind is None or not marks:
        return None
    longest = sorted(map(re.escape, marks), key=len, reverse=True)
    match = re.match(rf"\s*({'|'.join(longest)})", behind)
    return None if match is None or marks[match[1]] in known else marks[match[1]]


def _behind_an_answer(template: str, special: Mapping[str, Any]) -> str | None:
    """What the template writes behind the answer that ends a conversation; None if it writes none.

    In a process of its own, which ends: a template is a program that came with the model.
    """
    request = json.dumps({"template": template, "special": {name: str(text) for name, text in special.items()}})
    try:
        done = subprocess.run(
            [sys.executable, "-P", closing_mark.__file__],
            input=request,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=True,
        )
        return str(json.loads(done.stdout))
    except (subprocess.SubprocessError, ValueError) as error:
        log.warning("the chat template can't be tried for its end of turn: %s", error)
        return None
