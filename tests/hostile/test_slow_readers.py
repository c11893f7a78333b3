"""Clients that ask for answers and stop reading: what they cost is bounded, and what they read later is whole."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack
from pathlib import Path

from tests.e2e.harness import Answer, Client, Server, serving, some_tokens, token_ids
from tests.e2e.waiting import await_that
from warmkv import v1

READERS = 8
TOKENS = 800
TOP = 20

BYTES = 24 * TOP + 400
"""Of one token that nobody has read: log probabilities as numbers, and its part of what gRPC has taken already."""


def resident(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def test_readers_that_stop_cost_few_bytes_a_token(tmp_path: Path) -> None:
    """With the largest events there are. Connections of their own: each has gRPC's buffers."""
    with serving(tmp_path / "data", "--max-batch", str(READERS)) as (server, client), ExitStack() as stack:
        prompts = [token_ids(some_tokens(40, n)) for n in range(READERS)]
        for prompt in prompts:  # what the engine itself takes for as many is there afterwards
            client.generate("", prompt, max_tokens=2, top_logprobs=TOP)
        before = resident(server)
        streams = []
        for n, prompt in enumerate(prompts):
            # Windows as small as gRPC has them: what the server sends is what it keeps.
            reader = stack.enter_context(Client(server.address, options=[("grpc.http2.lookahead_bytes", 1 << 16)]))
            streams.append(
                reader.stream(f"slow{n}", prompt, max_tokens=TOKENS, ignore_eos=True, top_logprobs=TOP, request_id="1")
            )
        agents = [f"slow{n}" for n in range(READERS)]
        for _ in range(3):  # a loaded machine needs its time
            with contextlib.suppress(AssertionError):
                await_that(lambda: all(agent.token_count == 40 + TOKENS for agent in listed(client, agents)))
                break
        grown = resident(server) - before
        print(f"{READERS} readers of {TOKENS} tokens: {grown / 2**20:.0f} MiB, {grown / READERS / TOKENS:.0f} a token")
        answers = [Answer(list(stream)) for stream in streams]
        for answer in answers:
            assert len(answer.tokens) == answer.finished.usage.completion_tokens == TOKENS
            assert sum(len(delta.logprobs) for delta in answer.deltas) == TOKENS
        assert grown < READERS * TOKENS * BYTES + (READERS << 19)


def listed(client: Client, agents: list[str]) -> list[v1.Agent]:
    found = {agent.agent_id: agent for agent in client.list(page_size=1000).agents}
    return [found.get(agent, v1.Agent()) for agent in agents]
