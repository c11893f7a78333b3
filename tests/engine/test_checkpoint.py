"""Folders as people have them: the model that their makers meant, or a refusal that names what is wrong."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.layers.quantized import quantize
from mlx_lm.models import gpt2
from mlx_lm.models.rope_utils import YarnRoPE

from tests.engine import families
from tests.engine.conftest import FolderOf
from tests.engine.families import FAMILIES, VOCAB
from tests.engine.folders import write_model
from tests.engine.test_model import load, read, rewrite
from warmkv_server.contract.model import EndSource
from warmkv_server.errors import OperatorError

TOKENS = mx.array([[5, 6, 7, 8, 9]])
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.fixture
def folder(tmp_path: Path, folder_of: FolderOf) -> Path:
    """A llama's own copy."""
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "model"))


def logits(folder: Path, **options: Any) -> mx.array:
    made: mx.array = load(folder, **options).model(TOKENS)
    return made


# Rotations


def test_a_nested_rotation_is_the_same_as_a_flat_one(folder: Path) -> None:
    rewrite(folder / "config.json", rope_theta=100.0)
    flat = logits(folder)
    rotation = {"rope_type": "default", "rope_theta": 100.0}
    rewrite(folder / "config.json", rope_theta=None, rope_parameters=rotation)
    assert mx.array_equal(logits(folder), flat)
    rewrite(folder / "config.json", rope_theta=10000.0)  # what is nested wins, as in transformers
    assert mx.array_equal(logits(folder), flat)


def test_a_nested_scaling_is_the_same_as_a_flat_one(folder: Path) -> None:
    rewrite(folder / "config.json", rope_scaling=YARN)
    flat = logits(folder)
    rewrite(folder / "config.json", rope_theta=None, rope_scaling=None, rope_parameters={"rope_theta": 10000.0, **YARN})
    assert mx.array_equal(logits(folder), flat)


def test_rotations_by_type_of_layer(tmp_path: Path, folder_of: FolderOf) -> None:
    folder = Path(shutil.copytree(folder_of("gemma3_text"), tmp_path / "model"))
    rewrite(folder / "config.json", rope_theta=500.0, rope_local_base_freq=50.0)
    flat = logits(folder)
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    rewrite(folder / "config.json", rope_theta=None, rope_local_base_freq=None, rope_parameters=nested)
    assert mx.array_equal(logits(folder), flat)


def test_a_scaling_that_the_class_does_not_look_at_is_applied(tmp_path: Path, folder_of: FolderOf) -> None:
    folder = Path(shutil.copytree(folder_of("qwen3_moe"), tmp_path / "model"))
    plain = logits(folder)
    rewrite(folder / "config.json", rope_scaling=YARN)
    loaded = load(folder)
    assert not mx.allclose(loaded.model(TOKENS), plain, atol=1e-3)
    assert {type(layer.self_attn.rope) for layer in loaded.model.layers} == {YarnRoPE}


def test_a_ramp_without_rounded_ends_and_a_given_attention_factor(folder: Path) -> None:
    """The formulas of the paper, written out by hand for one frequency between the ends of the ramp."""
    rewrite(folder / "config.json", rope_scaling={**YARN, "truncate": False, "attention_factor": 1.5})
    rope = load(folder).model.layers[0].self_attn.rope
    assert rope.mscale == 1.5

    def place(rotations: int) -> float:
        return 64 * math.log(1024 / (rotations * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = place(32), place(1)
    at = 15
    ramp = (at - low) / (high - low)
    inverse = 10000.0 ** (-2 * at / 64) * ((1 - ramp) + ramp / 4)
    assert rope._freqs[at].item() == pytest.approx(1 / inverse, rel=1e-5)


def test_what_is_left_out_is_as_transformers_has_it(tmp_path: Path, folder_of: FolderOf) -> None:
    """mlx-lm takes one expert's weight as it is where config.json doesn't say; the authors' code normalises it."""
    folder = Path(shutil.copytree(folder_of("qwen3_next"), tmp_path / "model"))
    rewrite(folder / "config.json", norm_topk_prob=True)
    said = logits(folder)
    rewrite(folder / "config.json", norm_topk_prob=None)
    assert mx.array_equal(logits(folder), said)


# The limit


LIMITS: list[tuple[dict[str, Any], int]] = [
    ({"max_position_embeddings": None, "n_positions": 300}, 300),
    ({"max_position_embeddings": None, "max_sequence_length": 300, "seq_length": 200}, 200),
    ({"max_position_embeddings": None, "max_seq_len": 300}, 300),
    ({"max_position_embeddings": 1024, "rope_scaling": YARN}, 4096),
    ({"max_position_embeddings": 1280, "rope_scaling": YARN}, 4096),
    ({"max_position_embeddings": 8192, "rope_scaling": YARN}, 8192),
    ({"max_position_embeddings": 1024, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 2048),
    (
        {
            "max_position_embeddings": 2048,
            "rope_scaling": {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
        2048,
    ),
    ({"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 2048),
]


@pytest.mark.parametrize(("changes", "limit"), LIMITS)
def test_the_limit_under_its_names_and_with_scaling(changes: dict[str, Any], limit: int, folder: Path) -> None:
    rewrite(folder / "config.json", **changes)
    assert load(folder).info.context_limit == limit


def test_a_table_of_positions_is_a_limit(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2",
        "n_ctx": 64,
        "n_positions": 64,
        "n_embd": 64,
        "n_head": 1,
        "n_layer": 1,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": VOCAB,
    }
    write_model(tmp_path / "model", config, gpt2.Model(gpt2.ModelArgs.from_dict(config)))
    assert load(tmp_path / "model").info.context_limit == 64
    with pytest.raises(OperatorError, match=r"--context-limit 65 .* 64 positions"):
        load(tmp_path / "model", context_limit=65)


# Weights


def in_two(folder: Path) -> dict[str, mx.array]:
    """Split the weights into two shards with an index."""
    weights = read(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"model-{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    shards = {name.replace("-1-", "-00001-").replace("-2-", "-00002-"): each for name, each in shards.items()}
    for file, each in shards.items():
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in each})
    index = {"metadata": {}, "weight_map": {name: file for file, each in shards.items() for name in each}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


@pytest.mark.parametrize("stray", ["model.safetensors", "model-00001-of-00004.safetensors", "model-fp16.safetensors"])
def test_what_the_index_names_is_read_and_nothing_else(stray: str, folder: Path) -> None:
    meant = load(folder)
    weights = in_two(folder)
    digest = load(folder).info.weights_digest
    mx.save_safetensors(str(folder / stray), {name: array * 0.5 for name, array in weights.items()})
    loaded = load(folder)
    assert mx.array_equal(loaded.model(TOKENS), meant.model(TOKENS))
    assert loaded.info.weights_digest == digest


def test_shards_that_are_missing_are_named(folder: Path) -> None:
    in_two(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OperatorError, match=r"lacks model-00002-of-00002\.safetensors; is the download complete"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(OperatorError, match=r"lacks model-00002-of-00002\.safetensors"):
        load(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model_b.safetensors")
    (folder / "model.safetensors").rename(folder / "model_a.safetensors")
    with pytest.raises(OperatorError, match=r"both in model_a\.safetensors and in model_b\.safetensors"):
        load(folder)


def change_weights(folder: Path, **changes: mx.array | None) -> None:
    weights = {**read(folder / "model.safetensors"), **changes}
    kept = {name: array for name, array in weights.items() if array is not None}
    mx.save_safetensors(str(folder / "model.safetensors"), kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"Missing 1 parameters: model\.norm\.weight"),
        ({"model.extra.weight": mx.zeros((4,))}, r"parameters not in model: model\.extra\.weight"),
        ({"model.norm.weight": mx.zeros((8,))}, r"Expected shape \(64,\).*\(8,\).*model\.norm\.weight"),
        ({"model.norm.weight": mx.zeros((64,), mx.uint8)}, r"model\.norm\.weight are of type uint8"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Any], message: str, folder: Path) -> None:
    change_weights(folder, **change)
    with pytest.raises(OperatorError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_off_or_is_a_pointer_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(OperatorError, match=r"model\.safetensors is no whole safetensors file.*cut off"):
        load(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(OperatorError, match=r"model\.safetensors is no whole safetensors file"):
        load(folder)


def test_a_class_that_ends_the_process_is_refused(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="olmo")
    with pytest.raises(OperatorError, match=r"needs a package that isn't installed"):
        load(folder)


def test_weights_of_a_last_product_are_not_dropped_where_the_config_does_not_tie_them(folder: Path) -> None:
    untied = logits(folder)
    rewrite(folder / "config.json", tie_word_embeddings=None)
    assert mx.array_equal(logits(folder), untied)


# Quantisation


def test_layers_of_several_widths(tmp_path: Path) -> None:
    weights = families.build("llama")
    wide: dict[str, Any] = {"bits": 8, "group_size": 32}

    def width_of(name: str, module: Any) -> Any:
        return hasattr(module, "to_quantized") and (wide if "down_proj" in name else True)

    quantize(weights, group_size=64, bits=4, class_predicate=width_of)
    layers = {f"model.layers.{n}.mlp.down_proj": wide for n in range(2)}
    width: dict[str, Any] = {"group_size": 64, "bits": 4}
    for name, changes in {
        "told": {"quantization": {**width, **layers}},
        "untold": {"quantization": width},
        "under the other name": {"quantization_config": {**width, **layers}},
    }.items():
        write_model(tmp_path / name, {**FAMILIES["llama"].config, **changes}, weights)
        assert mx.allclose(load(tmp_path / name).model(TOKENS), weights(TOKENS), atol=1e-4)
    write_model(tmp_path / "unsaid", FAMILIES["llama"].config, weights)
    with pytest.raises(OperatorError, match=r"weights are quantised, and config\.json has no quantization"):
        load(tmp_path / "unsaid")


def test_a_quantisation_that_is_not_known_is_refused_by_its_name(folder: Path) -> None:
    rewrite(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(OperatorError, match=r"quantised by bitsandbytes"):
        load(folder)


# Chat templates and ends


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_template_that_a_processor_saved(name: str, folder: Path) -> None:
    rewrite(folder / "tokenizer_config.json", chat_template=None)
    assert not load(folder).tokenizer.has_chat_template
    (folder / name).write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    tokenizer = load(folder).tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_ends_say_who_named_them(folder: Path) -> None:
    rewrite(folder / "config.json", eos_token_id=None, text_config=None)
    rewrite(folder / "generation_config.json", eos_token_id=[0, 40, 100_000])
    ends = {end.token_id: end.sources for end in load(folder).info.ends}
    assert ends[0] == ends[40] == (EndSource.GENERATION_CONFIG,)
    assert all(EndSource.CONFIG not in by for by in ends.values())
    assert 100_000 not in ends
    rewrite(folder / "generation_config.json", eos_token_id="two")
    with pytest.raises(OperatorError, match=r"eos_token_id is 'two'.*generation_config\.json"):
        load(folder)


def test_ends_of_a_nested_config(tmp_path: Path, folder_of: FolderOf) -> None:
    folder = Path(shutil.copytree(folder_of("llama4_chunked"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    rewrite(folder / "config.json", eos_token_id=None, text_config={**config["text_config"], "eos_token_id": [30, 31]})
    assert load(folder).info.eos_token_ids >= {30, 31}


def test_the_mark_that_the_template_writes_behind_an_answer_is_an_end(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    mark = next(each for each in added if each["id"] not in load(folder).info.eos_token_ids)
    template = "{% for m in messages %}{{ m.content }}" + mark["content"] + "{% endfor %}"
    rewrite(folder / "tokenizer_config.json", chat_template=template)
    ends = {end.token_id: end.sources for end in load(folder).info.ends}
    assert ends[mark["id"]] == (EndSource.CHAT_TEMPLATE,)
