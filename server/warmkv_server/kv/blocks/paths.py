"""Where the files of a data directory are."""

from __future__ import annotations

from pathlib import Path

from warmkv_server.contract.kv import PartKind
from warmkv_server.kv.blocks import blockfile

BLOCKS = "blocks"


QUARANTINE = "quarantine"


def block_path(data_dir: Path, node: str, kind: PartKind) -> Path:
    """Where a node's file is; `node` in hex. Spread over 256 folders."""
    return data_dir.joinpath(BLOCKS, node[:2], blockfile.file_name(node, kind))
