"""A server on a data directory that a server of format 1 has left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e.harness import serving, token_ids
from tests.version_1.directories import unpack
from tests.version_1.make import SERVED_TOKENS
from warmkv import v1


@pytest.mark.skipif(sys.platform == "darwin", reason="it was made on a CPU, where KV is computed in another data type")
def test_its_agent_is_warm(tmp_path: Path) -> None:
    data_dir = unpack("served", tmp_path / "data")
    full = max(data_dir.glob("blocks/*/*"), key=lambda path: path.stat().st_size).stat()
    with serving(data_dir) as (server, client):
        answer = client.extend("a", token_ids([9, 10, 11]))
        assert answer.cache.source == v1.CACHE_SOURCE_WARM, answer
        assert answer.cache.cached_tokens == len(SERVED_TOKENS)
        assert server.terminate() == 0
        assert "took over 2 files of format 1" in server.log_text()
    assert full.st_ino in {path.stat().st_ino for path in data_dir.glob("blocks/*/*")}  # the same file
    with serving(data_dir) as (server, client):
        assert client.extend("a", token_ids([12])).cache.cached_tokens == len(SERVED_TOKENS) + 3
        assert server.log_text().count("took over") == 1
