"""Which version of what is at work; the one place that knows."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

UNKNOWN = "unknown"
_PROJECT = Path(__file__).parents[3] / "pyproject.toml"


def version_of(package: str) -> str:
    """The version of a package that is installed; of our own also where it runs from its source."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _of_source() if package == "warmkv" else UNKNOWN


def _of_source() -> str:
    try:
        project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
        return str(project["version"]) if project["name"] == "warmkv" else UNKNOWN
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return UNKNOWN
