"""KV that is stored as an operator chose, in codecs that are made for the model."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.commands import assert_one_sentence, run_warmkv
from tests.e2e.harness import Answer, Client, serving, some_tokens, text, token_ids
from warmkv import v1

SUFFIX = text(" So the answer is")


def answer(client: Client, agent: str) -> tuple[Answer, list[float]]:
    got = client.generate(agent, SUFFIX, ephemeral=True, max_tokens=24, top_logprobs=1)
    return got, [each.logprob for delta in got.deltas for each in delta.logprobs]


def test_hot_warm_restarted_and_imported_are_one(tmp_path: Path) -> None:
    """Bit for bit: logprobs are compared as they are."""
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "a.warmkv"
    with serving(here, "--kv", "quality") as (server, client):
        client.prime("a", token_ids(some_tokens(700)))
        client.generate("a", text(" Some more of it, to have a tail."), max_tokens=40)
        hot, expected = answer(client, "a")
        assert hot.cache.source == v1.CACHE_SOURCE_HOT
        client.evict("a")
        warm, found = answer(client, "a")
        assert warm.cache.source == v1.CACHE_SOURCE_WARM
        assert (warm.tokens, found) == (hot.tokens, expected)
        for layer in client.info().layers:
            for stream in (layer.keys, layer.values):
                assert (stream.codec, stream.bits, stream.group_size, stream.reason) == ("o4", 4, 64, "")
                assert 0 < stream.loss < 0.05
        assert client.info().kv_bytes_per_token == 4 * 2 * 2 * (64 * 17 // 4 // 8 + 2)
        done = run_warmkv("agents", "export", "a", "-o", file, "--data-dir", server.data_dir)
        assert done.returncode == 0, done.stderr
        server.kill()
    with serving(here, "--kv", "quality") as (server, client):
        assert server.log_text().count("looking at what the model computes") == 1
        restarted, found = answer(client, "a")
        assert restarted.cache.source == v1.CACHE_SOURCE_WARM
        assert restarted.cache.cached_tokens == warm.cache.cached_tokens
        assert (restarted.tokens, found) == (hot.tokens, expected)
        assert "left alone" not in server.log_text()
        assert "others could use" not in server.log_text()

    wrong = run_warmkv("agents", "import", file, "--data-dir", there, "--model", "builtin:tiny")
    assert_one_sentence(wrong, "kv (o4 in the archive")
    (there / "codecs").mkdir(parents=True)
    (kept,) = (here / "codecs").iterdir()
    (there / "codecs" / kept.name).write_bytes(kept.read_bytes())
    done = run_warmkv("agents", "import", file, "--data-dir", there, "--model", "builtin:tiny", "--kv", "quality")
    assert done.returncode == 0, done.stderr
    with serving(there, "--kv", "quality") as (_, client):
        imported, found = answer(client, "a")
        assert imported.cache.source == v1.CACHE_SOURCE_WARM
        assert (imported.tokens, found) == (hot.tokens, expected)


def test_a_context_goes_on_with_the_choice_that_it_was_made_with(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(data, "--kv-bits", "4") as (_, client):
        client.prime("a", token_ids(some_tokens(300)))
    with serving(data, "--kv", "k=o5,v=hadamard3") as (server, client):
        assert client.get("a").stale_tokens == 300
        client.prime("b", token_ids(some_tokens(300, seed=1)))
        assert "serve with --kv-bits 4 --kv-group-size 64" in server.log_text()
        assert {layer.keys.codec for layer in client.info().layers} == {"o5"}
        assert {layer.values.codec for layer in client.info().layers} == {"hadamard3"}
    with serving(data, "--kv", "affine4") as (server, client):
        assert client.get("a").stale_tokens == 0
        assert client.get("b").stale_tokens == 300
        assert "serve with --kv k=o5,v=hadamard3 --kv-group-size 64" in server.log_text()
    refused = run_warmkv("serve", "--kv", "o7", "--data-dir", data)
    assert_one_sentence(refused, "--kv (WARMKV_KV) can't be 'o7'")
    assert_one_sentence(run_warmkv("serve", "--kv", "exact", "--kv-bits", "4", "--data-dir", data), "give one of them")
