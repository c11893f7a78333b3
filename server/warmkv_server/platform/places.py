"""Where this platform has programs keep what is theirs."""

from __future__ import annotations

from pathlib import Path

import platformdirs

_NAME = "warmkv"
_EARLIER = Path("data")
_INDEX_FILE = "index.sqlite"


def data_dir() -> Path:
    """For contexts, unless an operator names another folder: such as ~/.local/share/warmkv."""
    return platformdirs.user_data_path(_NAME, appauthor=False)


def state_dir() -> Path:
    """For what a user's own commands remember: such as ~/.local/state/warmkv."""
    return platformdirs.user_state_path(_NAME, appauthor=False)


def earlier_data_dir() -> Path | None:
    """./data, where a server that was told nothing else used to keep its contexts, if there are any."""
    return _EARLIER if (_EARLIER / _INDEX_FILE).is_file() else None
