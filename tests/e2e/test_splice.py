"""A history that comes back as text: where it says what is held, it has the tokens that are held."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import grpc
import pytest

from tests.e2e.harness import Answer, Client, chat, check_sums, refused, serving, some_tokens, text, token_ids
from warmkv import v1

TURNS = 6


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server that keeps contexts of requests without an agent."""
    with serving(tmp_path_factory.mktemp("splice") / "data", "--keep-anonymous", "1h") as (_, client):
        yield client


def sampled(seed: int) -> v1.SamplingParams:
    """So wildly that tokens are often not those that their text is tokenised to, nor whole characters."""
    return v1.SamplingParams(temperature=30.0, top_k=1000, seed=seed)


def talk(client: Client, agent_id: str, seed: int, *, as_tokens: bool = False, **fields: object) -> list[Answer]:
    """Some turns of a client that sends all messages again."""
    said: list[tuple[str, str]] = []
    answers = []
    for turn in range(TURNS):
        said.append(("user", f"Question {seed + turn}, please."))
        content = chat(*said)
        if as_tokens:  # as a gateway has them
            content = token_ids(client.count(content, context_mode=v1.CONTEXT_MODE_REPLACE).token_ids)
        answer = client.generate(
            agent_id,
            content,
            context_mode=v1.CONTEXT_MODE_REPLACE,
            sampling=sampled(seed + turn),
            max_tokens=24,
            ignore_eos=False,
            **fields,
        )
        check_sums(answer.cache)
        said.append(("assistant", answer.text))
        answers.append(answer)
    return answers


def lost(answers: list[Answer]) -> int:
    """Turns that computed again what the turn before had left, but for the end that a message has behind an answer."""
    exact = 0
    for before, after in pairwise(answers):
        had = before.cache.prompt_tokens + before.finished.usage.completion_tokens
        assert after.cache.prompt_tokens - after.cache.cached_tokens >= 1
        exact += after.cache.cached_tokens >= had - 1
    return len(answers) - 1 - exact


@pytest.mark.parametrize(("agent_id", "as_tokens"), [("ada", False), ("bo", True), ("", False), ("", True)])
def test_all_that_was_sampled_is_reused(keeping: Client, agent_id: str, as_tokens: bool) -> None:
    seed = 100 * len(agent_id) + 10 * as_tokens
    fields = {"splice": True} if as_tokens else {}
    with_it = talk(keeping, agent_id, seed, as_tokens=as_tokens, **fields)
    without = talk(keeping, f"{agent_id}-2" if agent_id else "", seed + 5000, as_tokens=as_tokens, splice=False)
    assert lost(with_it) == 0
    assert lost(without) > 0  # else there was nothing to see here
    assert sum(answer.cache.spliced_tokens for answer in with_it) > 0
    assert not any(answer.cache.spliced_tokens for answer in without)


def test_tokens_are_verbatim_unless_the_request_says_otherwise(keeping: Client) -> None:
    answers = talk(keeping, "verbatim", 7, as_tokens=True)
    assert not any(answer.cache.spliced_tokens for answer in answers)


def test_a_message_that_was_changed_is_the_changed_one(keeping: Client) -> None:
    first = keeping.generate(
        "edit", chat(("user", "Say something.")), sampling=sampled(3), max_tokens=40, ignore_eos=False
    )
    changed = first.text[: len(first.text) // 2] + " and that is all"
    messages = (("user", "Say something."), ("assistant", changed), ("user", "And now?"))
    wanted = keeping.count(chat(*messages), context_mode=v1.CONTEXT_MODE_REPLACE)
    answer = keeping.generate("edit", chat(*messages), context_mode=v1.CONTEXT_MODE_REPLACE, max_tokens=4)
    cold = keeping.generate("cold", token_ids(wanted.token_ids), max_tokens=4)
    assert answer.cache.prompt_tokens + answer.cache.spliced_tokens >= cold.cache.prompt_tokens
    assert answer.cache.cached_tokens > 5
    unrelated = keeping.generate("edit", chat(("user", "Else.")), context_mode=v1.CONTEXT_MODE_REPLACE)
    assert unrelated.cache.spliced_tokens == 0


def test_a_chat_that_is_primed_again_with_its_answers_is_what_it_was(keeping: Client) -> None:
    question = ("user", "Tell me more.")
    answer = keeping.generate("primed", chat(question), sampling=sampled(11), max_tokens=30, ignore_eos=False)
    before = keeping.get("primed")
    primed = keeping.prime("primed", chat(question, ("assistant", answer.text)))
    assert primed.cache.cached_tokens >= before.token_count - 1


def test_where_nothing_is_held_nothing_is_spliced_and_appending_is_refused(keeping: Client) -> None:
    new = keeping.generate("new", chat(("user", "Hello.")), context_mode=v1.CONTEXT_MODE_REPLACE, splice=True)
    assert new.cache.spliced_tokens == 0
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as found:
        keeping.generate("new", text("more"), splice=True)
    assert found[0].fields == ["splice"]
    raw = some_tokens(300, 1)
    keeping.generate("new", token_ids(raw), context_mode=v1.CONTEXT_MODE_REPLACE, splice=True)
    assert keeping.get("new").token_count == 308
