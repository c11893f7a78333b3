"""What the operator's commands are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kv.driver import Driver
from tests.kv.words import LAYOUTS, context


@pytest.fixture
async def data_dir(tmp_path: Path) -> Path:
    """Agent a of 1000 tokens in four blocks, and b of another context; no server."""
    driver = await Driver.open(tmp_path, LAYOUTS["everything"])
    await driver.put("a", context(1000))
    await driver.put("b", context([9] * 300))
    await driver.close()
    return tmp_path
