"""A program of its own: `python write_model.py SHAPE DIR`. Writes a model of random weights for two processes to load.

It is run, never imported: it needs MLX and the server's package, which the benchmark itself stays free of.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def main(shape: str, folder: Path) -> None:
    build: Any = import_module("warmkv_server.engine.model.random_model").build
    flatten: Any = import_module("mlx.utils").tree_flatten
    save: Any = import_module("mlx.core").save_safetensors
    tiny = Path(str(import_module("warmkv_server.models.tiny").__file__)).parent
    model, config = build(shape)
    folder.mkdir(parents=True)
    save(str(folder / "model.safetensors"), dict(flatten(model.parameters())))
    for name in TOKENIZER_FILES:
        shutil.copy(tiny / name, folder)
    # Last: a folder with a configuration is a whole one.
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
