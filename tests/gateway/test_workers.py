"""Two servers behind a gateway: a conversation stays where its KV is, whoever is started anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.gateway.harness import Gateway, Said, Worker, eventually, running, user
from warmkv import v1


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, list[Worker]]]:
    with running(tmp_path_factory.mktemp("two"), "--keep-anonymous", "1h", workers=2) as both:
        yield both


def opening(number: int) -> Said:
    """Of a conversation of more than one block of 64 tokens."""
    return user(f"Conversation {number} is about {'many things and ' * 20}the town of {number * 7}.")


def go_on(front: Gateway, workers: Sequence[Worker], said: Said, agent_id: str = "") -> tuple[int, int, int]:
    """The next turn: which worker answered, the tokens that it had, and those that there were before."""
    held = [worker.chats() for worker in workers]
    answer = front.chat(said, agent_id, max_tokens=12)
    (number,) = eventually(lambda: [n for n, worker in enumerate(workers) if worker.chats() > held[n]])
    said.append({"role": "assistant", "content": answer.choices[0].message.content})
    said += user("And then what came of it?")
    cached = answer.usage.prompt_tokens_details.cached_tokens
    return number, cached, answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_conversations_return_to_their_worker(two: tuple[Gateway, list[Worker]]) -> None:
    """Told by the prefixes that each says it holds: after the gateway was started anew, and after both were killed."""
    front, workers = two
    chats = [opening(number) for number in range(4)]
    agents = ["", "", "kept-2", "kept-3"]
    at, before = [], []
    for said, agent_id in zip(chats, agents, strict=True):
        number, _, tokens = go_on(front, workers, said, agent_id)
        at.append(number)
        before.append(tokens)
    assert sorted({*at}) == [0, 1], "the conversations are all at one worker"

    def all_return() -> None:
        for number, (said, agent_id) in enumerate(zip(chats, agents, strict=True)):
            worker, cached, tokens = go_on(front, workers, said, agent_id)
            assert (number, worker, cached) == (number, at[number], before[number])
            before[number] = tokens

    all_return()
    told = front.streams()
    front.stop()
    front.start()
    eventually(lambda: front.knows(2) and front.streams() == told + 2)
    all_return()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.start()
    eventually(lambda: front.knows(2) and front.streams() == told + 4)
    for number, agent_id in enumerate(agents):
        if agent_id:
            assert workers[at[number]].own.get(agent_id).tier == v1.TIER_WARM
    all_return()
