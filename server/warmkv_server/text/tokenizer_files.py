"""A tokenizer's files as others can make the same one of them, who have not the model's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from warmkv_server.text.task import TokenizerSource

PATTERNS = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "*.tiktoken")
"""Of the files that tokens depend on."""
_BESIDE = ("config.json", "generation_config.json", "added_tokens.json")
"""What those who load a tokenizer look into, too."""
_TEMPLATE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"


def tokenizer_files(source: TokenizerSource) -> dict[str, bytes]:
    """Contents by name, with the chat template that this server uses in place of the folder's own."""
    found = {path.name: path.read_bytes() for path in _paths(source.folder)}
    if source.chat_template is not None:
        found = {name: content for name, content in found.items() if not name.startswith("chat_template")}
        found[_TEMPLATE] = source.chat_template.encode()
        settings = json.loads(found.get(_SETTINGS, b"{}")) | {"chat_template": source.chat_template}
        found[_SETTINGS] = json.dumps(settings, ensure_ascii=False, indent=2).encode()
    return found


def _paths(folder: Path) -> Iterator[Path]:
    for pattern in (*PATTERNS, *_BESIDE):
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())
