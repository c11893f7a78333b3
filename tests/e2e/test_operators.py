"""What operators do with a real server's data directory."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.commands import assert_one_sentence, run_warmkv
from tests.e2e.harness import serving, some_tokens, text, token_ids
from warmkv import v1


def test_an_agent_exported_beside_its_server_goes_on_elsewhere_where_it_was(tmp_path: Path) -> None:
    """The first request on the other machine is warm and gives the tokens that the first machine gives."""
    suffix, file, there = text(" So the answer is"), tmp_path / "a.warmkv", tmp_path / "there"
    with serving(tmp_path / "here") as (server, client):
        client.prime("a", token_ids(some_tokens(700)))
        client.extend("a", text(" Some more of it, to have a tail."))
        answer = client.generate("a", suffix, ephemeral=True, max_tokens=24)
        done = run_warmkv("agents", "export", "a", "-o", file, "--data-dir", server.data_dir)
        assert done.returncode == 0, done.stderr
        checked = run_warmkv("store", "verify", "--data-dir", server.data_dir)
        assert checked.returncode == 0, checked.stdout
        moved = client.get("a")

    refused = run_warmkv("agents", "import", file, "--data-dir", there, "--model", "builtin:tiny", "--kv-bits", "8")
    assert_one_sentence(refused, "kv_bits (4 in the archive, 8 here)")
    assert not there.exists()
    done = run_warmkv("agents", "import", file, "--data-dir", there, "--model", "builtin:tiny", "--as", "b")
    assert done.returncode == 0, done.stderr

    with serving(there) as (_, client):
        agent = client.get("b")
        assert (agent.token_count, agent.revision) == (moved.token_count, moved.revision)
        warm = client.generate("b", suffix, ephemeral=True, max_tokens=24)
        assert warm.cache.source == v1.CACHE_SOURCE_WARM
        assert warm.cache.cached_tokens == moved.token_count
        assert warm.tokens == answer.tokens
