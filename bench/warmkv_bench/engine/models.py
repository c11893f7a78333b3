"""One model in a folder that the server and mlx-lm both load."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from warmkv_bench.config import ConfigError


def model_folder(model: str, cache: Path) -> Path:
    """The folder of `builtin:NAME`, `random:SHAPE` or a folder; random weights are written under `cache` once.

    Raises:
        ConfigError: there is no such model.
    """
    scheme, _, name = model.partition(":")
    if scheme == "builtin":
        package = find_spec("warmkv_server")
        if package is None or package.origin is None:
            raise ConfigError(f"{model} comes with the server, which is not installed: name a folder")
        folder = Path(package.origin).parent / "models" / name
    elif scheme == "random":
        folder = cache / "models" / name
        if not (folder / "config.json").is_file():
            _write(name, folder)
    else:
        folder = Path(model).expanduser().absolute()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"no model at {model!r}: give builtin:tiny, random:SHAPE, or a folder in mlx-lm's layout")
    return folder


def _write(shape: str, folder: Path) -> None:
    script = Path(__file__).with_name("write_model.py")
    done = subprocess.run(
        [sys.executable, str(script), shape, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"random:{shape} could not be written: {(done.stderr.splitlines() or ['it ended'])[-1]}")
