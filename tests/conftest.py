"""What holds for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import warmkv_server  # noqa: F401 - loads a fast BLAS, which has to be there before a test imports MLX

# No example is too slow and no data too slow to draw: the machine may be a slow one, or a busy one.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Files of tests run beside each other, so products of matrices take their share of the cores, in the servers that tests
# start too.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("MKL_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("long", "Folders and files of tests that `-m 'not long'` leaves out.", type="paths", default=[])
    parser.addini("slow", "Those that `-m 'not slow'` leaves out, besides the long ones.", type="paths", default=[])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what is long or slow, and has it begin first, in the lists' order: what is long must not begin last."""
    long: list[Path] = config.getini("long")
    slow = [*long, *config.getini("slow")]
    place = {item: _place(item.path, slow) for item in items}
    for item, at in place.items():
        if at < len(slow):
            item.add_marker(pytest.mark.slow)
        if at < len(long):
            item.add_marker(pytest.mark.long)
    items.sort(key=place.__getitem__)


def _place(path: Path, listed: list[Path]) -> int:
    """Where the list has a file, or the most special of its folders."""
    found = [(len(each.parts), at) for at, each in enumerate(listed) if path.is_relative_to(each)]
    return max(found)[1] if found else len(listed)
