"""One folder of tiny models for the whole run, written when a test first asks for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine import families
from tests.engine.folders import write_model
from warmkv_server.engine.model.device import prepare

# Tests run models on their own thread too.
prepare()

FolderOf = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """The folder of a family's model, in the layout that `--model` takes."""
    root = tmp_path_factory.mktemp("families")

    def folder_of(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            write_model(folder, families.FAMILIES[name].config, families.build(name))
        return folder

    return folder_of
