"""SmolLM2 with quantised KV: who else is served, and guessing ahead, change no token that the model is sure of."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from tests.e2e.harness import Answer, Client, chat, serving
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

    def answered(client: Client, prompt: str, **fields: int) -> Answer:
        content = chat(("user", prompt))
        return client.generate(f"a{next(names)}", content, max_tokens=ANSWER_TOKENS, sampling=GREEDY, **fields)

    with serving(tmp_path / "data", *flags) as (_, client):
        alone = [answered(client, prompt, top_logprobs=2) for prompt in PROMPTS]
        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            batch = list(threads.map(lambda prompt: answered(client, prompt), PROMPTS))
    with serving(tmp_path / "data", *flags, "--speculate-tokens", "8") as (_, client):
        guessed = [answered(client, prompt) for prompt in PROMPTS]
    differing = {}
    for way, answers in (("in a batch", batch), ("guessed", guessed)):
        for prompt, expected, got in zip(PROMPTS, alone, answers, strict=True):
            if got.tokens != expected.tokens:
                pairs = enumerate(zip(expected.tokens, got.tokens, strict=True))
                first = next(at for at, (a, b) in pairs if a != b)
                differing[way, prompt] = first, margins(expected)[first]
    print(differing or "no difference")
    assert all(margin <= SURE for _, margin in differing.values()), differing


def margins(answer: Answer) -> list[float]:
    """By how much each token's best was better than the next."""
    every = [token for delta in answer.deltas for token in delta.logprobs]
    return [token.top[0].logprob - token.top[1].logprob for token in every]
