"""SmolLM2 through the server: mlx-lm's tokens, and transformers' conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from transformers import AutoTokenizer

from tests.e2e.harness import Client, Server, chat, serving, text, token_ids
from warmkv import v1
from warmkv_server.engine.model import device

ANSWER_TOKENS = 12
BATCH = 8
TIE = 1e-3
"""Of logits: where the best two are nearer than that, rounding decides which comes first."""
TURNS = 6
SYSTEM = ("system", "You are a helpful assistant. Answer in one sentence.")
QUESTIONS = (
    "What is the capital of France?",
    "And of Spain?",
    "Name a river there.",
    "How long is it, in Kilometern? Grüße 🙂",
    "  Two   spaces, please.\n\nAnd a new line.",
    "Thank you! Say goodbye.",
)


@dataclass
class Reference:
    tokenizer: Any
    model: Any

    def answer(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        """Its greedy tokens, and by how much each was the best."""
        tokens, margins = [], []
        for token, logprobs in generate_step(mx.array(prompt), self.model, max_tokens=ANSWER_TOKENS):
            least, most = np.sort(np.array(mx.topk(logprobs, 2)))
            tokens.append(int(token))
            margins.append(float(most - least))
        return tokens, margins


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    device.prepare()
    model, _ = load_model(smollm2)
    model.set_dtype(mx.float32)  # as the server computes on a CPU
    return Reference(AutoTokenizer.from_pretrained(smollm2), model)


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client]]:
    with serving(tmp_path_factory.mktemp("data"), "--model", str(smollm2), "--kv-bits", "0") as both:
        yield both


def prompts(tokenizer: Any, lengths: list[int]) -> list[list[int]]:
    """Of so many tokens: pieces of what is written here."""
    root = Path(__file__).parents[2]
    book = "\n".join(path.read_text() for path in sorted([root / "README.md", *(root / "docs").glob("*.md")]))
    ids = tokenizer.encode(book, add_special_tokens=False)
    chance = random.Random(lengths[0])
    return [ids[(start := chance.randrange(len(ids) - length)) : start + length] for length in lengths]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A hundred prompts of 10 to 4,000 tokens, a tenth of them in each test; or a few short ones."""
    if "lengths" in metafunc.fixturenames:
        all_lengths = [round(10 * 400 ** (n / 99)) for n in range(100)]
        parts = [all_lengths[n::10] for n in range(10)]
        few = [10, 17, 33, 64, 120, 200, 257, 300]
        metafunc.parametrize(
            "lengths", parts if metafunc.config.getoption("--whole") else [few], ids=lambda each: f"to-{each[-1]}"
        )


def test_greedy_tokens_are_mlx_lms(reference: Reference, served: tuple[Server, Client], lengths: list[int]) -> None:
    _, client = served
    asked = prompts(reference.tokenizer, lengths)
    expected = [reference.answer(prompt) for prompt in asked]

    def answered(prompt: list[int]) -> list[int]:
        sampling = v1.SamplingParams(temperature=0)
        return client.generate("", token_ids(prompt), max_tokens=ANSWER_TOKENS, sampling=sampling, timeout=600).tokens

    for way in ("alone", f"in a batch of {BATCH}"):
        with ThreadPoolExecutor(1 if way == "alone" else BATCH) as threads:
            given = list(threads.map(answered, asked))
        ties = []
        for prompt, (tokens, margins), got in zip(asked, expected, given, strict=True):
            if got != tokens:
                first = next(n for n, (a, b) in enumerate(zip(tokens, got, strict=True)) if a != b)
                assert margins[first] < TIE, f"{len(prompt)} tokens, {way}: {got} and not {tokens}"
                ties.append((len(prompt), first, margins[first]))
        print(f"{way}: {len(asked)} prompts of {len(asked[0])} to {len(asked[-1])} tokens, ties {ties or 'none'}")


def test_a_chat_by_turns_is_transformers_conversation(reference: Reference, served: tuple[Server, Client]) -> None:
    _, client = served
    messages = [SYSTEM]
    client.prime("talk", chat(SYSTEM))
    held = ids_of(reference, messages, answer=False)
    for question in QUESTIONS[:TURNS]:
        messages.append(("user", question))
        new = client.count(chat(messages[-1]), agent_id="talk")
        answer = client.generate("talk", chat(messages[-1]), max_tokens=24, ignore_eos=False)
        held = [*held[: len(held) - new.replaced_tokens], *new.token_ids]
        assert held == ids_of(reference, messages, answer=True)
        assert answer.cache.prompt_tokens == len(held)
        held += answer.tokens
        messages.append(("assistant", answer.text))
        assert answer.text == reference.tokenizer.decode(answer.tokens).removesuffix("<|im_end|>")


def test_texts_are_tokenised_as_transformers_does(reference: Reference, served: tuple[Server, Client]) -> None:
    _, client = served
    for content in (*QUESTIONS, "a\0b", "<|im_start|>user\n", "\u00a0\u2028x", "日本語 नमस्ते"):
        assert list(client.count(text(content)).token_ids) == reference.tokenizer.encode(content)


def ids_of(reference: Reference, messages: list[tuple[str, str]], answer: bool) -> list[int]:
    listed = [{"role": role, "content": content} for role, content in messages]
    written = reference.tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=answer)
    ids: list[int] = reference.tokenizer.encode(written, add_special_tokens=False)
    return ids
