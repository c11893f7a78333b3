"""What the rest of the server may rely on in the built-in model's folder."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer

import warmkv_server.models.tiny
from training.evaluate import PROMPTS, answerer
from training.model_io import read_model

FOLDER = Path(warmkv_server.models.tiny.__file__).parent
MOST_BYTES = 8_000_000
ROLES = ["system", "user", "assistant"]
TEXTS = st.text(max_size=20).filter(lambda text: "<|" not in text)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": TEXTS}),
    min_size=1,
    max_size=6,
)
anything = settings(deadline=None)  # the first call of the tokenizer is slow


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
    return value


def test_everything_in_the_folder_together_is_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


def test_shape_is_a_stock_llama_that_the_kv_cache_can_quantise(config: dict[str, Any]) -> None:
    assert config["model_type"] == "llama"
    assert config["head_dim"] == 64
    assert config["tie_word_embeddings"] is True
    assert 2 <= config["num_hidden_layers"] <= 6
    assert config["max_position_embeddings"] == 32_768
    with safe_open(FOLDER / "model.safetensors", "numpy") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    assert 2e6 <= sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes) <= 6e6


def test_special_ids_leave_a_wide_range_of_plain_tokens(tokenizer: Any, config: dict[str, Any]) -> None:
    assert len(tokenizer) == config["vocab_size"]
    assert 4_096 <= len(tokenizer) <= 8_192
    assert tokenizer.all_special_ids
    assert not set(tokenizer.all_special_ids) & set(range(300, 3_000))
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert tokenizer.eos_token_id == config["eos_token_id"] == generation["eos_token_id"]
    assert tokenizer.bos_token_id == config["bos_token_id"]


@anything
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token(tokenizer: Any) -> None:
    every = "".join(chr(code) for code in [*range(0x250), *range(0x1F300, 0x1F700), *range(0x10000, 0x110000, 0x1000)])
    assert tokenizer.decode(tokenizer.encode(every, add_special_tokens=False)) == every
    assert tokenizer.unk_token_id is None


def test_text_gets_bos_once(tokenizer: Any) -> None:
    ids = tokenizer.encode("A cache keeps results.")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@anything
@given(messages=MESSAGES)
def test_chat_begins_with_bos_and_every_turn_ends(tokenizer: Any, messages: list[dict[str, str]]) -> None:
    ids = render(tokenizer, messages, prompt=False)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == len(messages)
    assert ids[-1] == tokenizer.eos_token_id


@anything
@given(messages=MESSAGES)
def test_a_longer_chat_starts_with_the_tokens_of_a_shorter_one(tokenizer: Any, messages: list[dict[str, str]]) -> None:
    rendered = [render(tokenizer, messages[:count], prompt=False) for count in range(1, len(messages) + 1)]
    for shorter, longer in pairwise(rendered):
        assert longer[: len(shorter)] == shorter


def test_an_answer_appended_is_the_chat_with_that_answer(tokenizer: Any) -> None:
    asked = [{"role": "user", "content": "What is a river?"}]
    answer = "A river is a large natural stream of water."
    told = [*asked, {"role": "assistant", "content": answer}]
    produced = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    assert render(tokenizer, told, prompt=False) == render(tokenizer, asked, prompt=True) + produced


def test_an_unknown_role_is_refused(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="not tool"):
        render(tokenizer, [{"role": "tool", "content": "42"}], prompt=False)


def test_turns_end_by_themselves() -> None:
    answer = answerer(*read_model())
    ended = [answer([{"role": "user", "content": prompt}], 300)[1] for prompt in PROMPTS]
    assert sum(ended) >= 9


def test_it_remembers_what_it_was_told() -> None:
    answer = answerer(*read_model())
    messages: list[dict[str, str]] = []
    for said in ("My name is Ada.", "I put the key in the garden.", "What is a river?", "Where is the key?"):
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": answer(messages, 60)[0]})
    assert "garden" in messages[-1]["content"]


def render(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
