"""Model folders in mlx-lm's layout, with the built-in model's tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from warmkv_server.engine.model.load import BUILT_IN

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
END = 1
"""The built-in tokenizer's end of sequence."""


def write_model(folder: Path, config: Mapping[str, Any], model: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": END, **config}))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    for name in TOKENIZER_FILES:
        shutil.copy(BUILT_IN / "tiny" / name, folder / name)
