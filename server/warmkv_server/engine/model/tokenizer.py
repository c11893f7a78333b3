"""Loading a model's tokenizer, with its chat template wherever that is kept, and which ids it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _tokenizer_defaults

from warmkv_server.errors import OperatorError
from warmkv_server.text import loading
from warmkv_server.text.tokenizer_files import PATTERNS

_PROCESSORS = ("chat_template.json", "processor_config.json")
"""Where processors of multimodal models keep the chat template; tokenizers don't look there."""


def load(folder: Path, chat_template: str | None = None) -> TokenizerWrapper:
    """The tokenizer in a folder.

    Args:
        chat_template: in place of the folder's own.

    Raises:
        OperatorError: if there is none that can be loaded.
    """
    try:
        defaults = _tokenizer_defaults(folder)
        tokenizer = loading.load(folder, chat_template, defaults=defaults)
        if tokenizer.chat_template is None and (template := _of_processor(folder)) is not None:
            tokenizer = loading.load(folder, template, defaults=defaults)
    except Exception as error:
        raise OperatorError(f"no tokenizer could be loaded from {folder}: {error}") from error
    return tokenizer


def _of_processor(folder: Path) -> str | None:
    for name in _PROCESSORS:
        path = folder / name
        template: Any = json.loads(path.read_text()).get("chat_template") if path.is_file() else None
        if isinstance(template, str):
            return template
    return None


def files(folder: Path) -> list[Path]:
    """Everything that tokens depend on."""
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    processor = folder / "processor_config.json"
    if processor.is_file() and "chat_template" in processor.read_text():
        found.add(processor)
    return sorted(found)
