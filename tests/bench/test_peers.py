"""Adapters of other servers, and what they are asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from warmkv_bench.peers.cli import end_tokens, library_of
from warmkv_bench.peers.openai_http import OpenAIServer
from warmkv_bench.peers.peer import Completion, PeerFailed
from warmkv_bench.peers.side_by_side import Case, SideBySide, peers_table, text_of_tokens

# A server of the completions API, as a program: five pieces, and the usage at the end.
SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        events = [{"choices": [{"text": "x"}]} for _ in range(body["max_tokens"])]
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": body["max_tokens"],
                 "prompt_tokens_details": {"cached_tokens": 3}}
        for event in [*events, {"choices": [], "usage": usage}]:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def words(text: str) -> int:
    return len(text.split())


class Echo:
    """A peer in this process that counts words; `extra` is by how many tokens it miscounts the prompt."""

    def __init__(self, name: str, extra: int = 0, output_tokens: int | None = None) -> None:
        self.name = name
        self.started = 0
        self._extra = extra
        self._output_tokens = output_tokens

    async def start(self) -> None:
        self.started += 1

    async def stop(self) -> None: ...

    async def close(self) -> None: ...

    async def ask(self, session: str, prompt: str, output_tokens: int) -> Completion:
        assert session
        times = [float(index + 1) for index in range(output_tokens)]
        return Completion(times, await words(prompt) + self._extra, self._output_tokens or output_tokens)


async def test_a_server_over_http_is_timed_piece_by_piece() -> None:
    server = OpenAIServer("test", [sys.executable, "-c", SERVER, "{port}"], {"seed": 1}, None, 20.0)
    try:
        await server.start()
        completion = await server.ask("s", "one two three four", 5)
    finally:
        await server.close()
    assert (completion.prompt_tokens, completion.output_tokens, completion.cached_tokens) == (4, 5, 3)
    assert len(completion.piece_times_ms) == 5
    assert completion.piece_times_ms == sorted(completion.piece_times_ms)


async def test_a_server_that_does_not_start_shows_what_it_wrote() -> None:
    program = "import sys; sys.exit('there is no model')"
    server = OpenAIServer("test", [sys.executable, "-c", program], {}, None, 20.0)
    with pytest.raises(PeerFailed, match="there is no model"):
        await server.start()
    await server.close()


async def test_every_peer_is_asked_the_same_and_restarted() -> None:
    peers = [Echo("one"), Echo("other")]
    samples = await SideBySide((64,), runs=2, output_tokens=4, seed=0).run(peers, words, lambda _: None)
    assert [sample.error for sample in samples] == [None] * (2 * 3 * 2)
    assert [peer.started for peer in peers] == [2, 2]
    assert {(sample.ttft_ms, sample.tpot_ms) for sample in samples} == {(1.0, 1.0)}
    table = peers_table(samples)
    assert [row[1] for row in table.rows] == [case for case in Case for _ in peers]


async def test_answers_of_another_length_are_no_samples() -> None:
    samples = await SideBySide((64,), 1, 4, 0).run([Echo("short", output_tokens=3)], words, lambda _: None)
    assert {sample.error for sample in samples} == {"3 tokens came, must be 4"}


async def test_a_peer_that_tokenises_differently_is_found() -> None:
    samples = await SideBySide((64,), 1, 4, 0).run([Echo("one"), Echo("other", extra=1)], words, lambda _: None)
    assert sum(sample.error is not None and "the prompt has" in sample.error for sample in samples) == 3


async def test_a_text_has_the_tokens_that_were_asked_for() -> None:
    for tokens in (1, 7, 500):
        assert await words(await text_of_tokens(tokens, "a", words)) == tokens
    first = {(await text_of_tokens(50, str(seed), words)).split()[0] for seed in range(20)}
    assert len(first) == 20


def test_the_blas_of_the_server_is_found() -> None:
    assert library_of("mkl (/opt/lib/libmkl_rt.so.3)") == "/opt/lib/libmkl_rt.so.3"
    assert library_of("reference") is None


def test_the_end_of_sequence_is_read_from_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert end_tokens(tmp_path) == [1]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert end_tokens(tmp_path) == [1, 7]
