"""What lies here, unpacked."""

from __future__ import annotations

import tarfile
from pathlib import Path

HERE = Path(__file__).parent
AGENT = HERE / "agent.tar"


def unpack(name: str, data_dir: Path) -> Path:
    """
    Args:
        name: `store` or `served`.
    """
    with tarfile.open(HERE / f"{name}.tar.xz") as tar:
        tar.extractall(data_dir, filter="data")
    return data_dir
