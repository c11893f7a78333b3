"""SmolLM2 with quantised KV: who else is served, and guessing ahead, change no token that the model is sure of."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from tests.e2e.harness import Client, chat, serving
from warmkv import v1

ANSWER_TOKENS = 64
SURE = 0.3
"""Nats between the best two tokens."""
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea and its harbours.",
    "Explain in three sentences why salt preserves fish.",
    "List five animals that live in the desert, one in each line.",
    "Repeat after me, five times: the light on the outer wall had gone out.",
    "Write a Python function that adds up the even numbers of a list.",
    "Who was Ada Lovelace, and what is she known for?",
)
GREEDY = v1.SamplingParams(temperature=0)


def test_a_token_that_it_is_sure_of_is_the_same_alone_in_a_batch_and_guessed(smollm2: Path, tmp_path: Path) -> None:
    flags = ("--model", str(smollm2), "--kv", "quality")
    names = count()

    def answered(client: Client, prompt: str, **fields: int) -> list[int]:
        content = chat(("user", prompt))
        answer = client.generate(f"a{next(names)}", content, max_tokens=ANSWER_TOKENS, sampling=GREEDY, **fields)
        if fields:
            for delta in answer.deltas:
                for token in delta.logprobs:
                    margins.append(token.top[0].logprob - token.top[1].logprob)
        return answer.tokens

    alone: list[tuple[list[int], list[float]]] = []
    with serving(tmp_path / "data", *flags) as (_, client):
        for prompt in PROMPTS:
            margins: list[float] = []
            alone.append((answered(client, prompt, top_logprobs=2), margins))
        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            batch = list(threads.map(lambda prompt: answered(client, prompt), PROMPTS))
    with serving(tmp_path / "data", *flags, "--speculate-tokens", "8") as (_, client):
        guessed = [answered(client, prompt) for prompt in PROMPTS]
        assert client.stats().scheduler.accepted_tokens
    differing = {}
    for way, answers in (("in a batch", batch), ("guessed", guessed)):
        for number, ((tokens, by), got) in enumerate(zip(alone, answers, strict=True)):
            assert len(by) == len(tokens) == len(got) == ANSWER_TOKENS
            if got != tokens:
                first = next(at for at, (a, b) in enumerate(zip(tokens, got, strict=True)) if a != b)
                differing[f"{way}, {number}"] = first, by[first]
    print(json.dumps(differing))
    assert all(margin <= SURE for _, margin in differing.values()), differing
