"""Loading a model: what is said about it, what makes it another, and every way an operator can get it wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from huggingface_hub import constants
from mlx.nn.layers.quantized import quantize
from mlx_lm.models import llama

from tests.engine import families
from tests.engine.conftest import FolderOf
from tests.engine.families import FAMILIES, VOCAB, WINDOW
from tests.engine.folders import END, write_model
from warmkv_server.contract.generation import Sampling
from warmkv_server.contract.model import StreamInfo
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.cache.codecs.codec import CodecPlan
from warmkv_server.engine.model import load as model
from warmkv_server.engine.model.load import BUILT_IN, LayerInfo, LoadedModel, ModelKind
from warmkv_server.errors import OperatorError

Change = Callable[[Path], object]
ON_CPU = mx.default_device() == mx.cpu


def load(
    spec: Path | str, *, adapter: Path | None = None, codecs: CodecPlan | None = None, **options: Any
) -> LoadedModel:
    options.setdefault("context_limit", None)
    return model.load(
        str(spec), adapter=None if adapter is None else str(adapter), codecs=codecs or codecs_for(), **options
    )


@pytest.fixture
def folder(tmp_path: Path, folder_of: FolderOf) -> Path:
    """A llama's own copy."""
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "model"))


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None takes one away."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def read(path: Path) -> dict[str, mx.array]:
    """A safetensors file, evaluated, so that it may be written over."""
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    mx.eval(weights)
    return weights


# What is said about a model


def test_a_model_is_described() -> None:
    info = load("builtin:tiny").info
    assert (info.model_id, info.kind) == ("builtin:tiny", ModelKind.BUILT_IN)
    assert (info.context_limit, info.eos_token_ids) == (32768, frozenset({END}))
    assert info.vocab_size >= 4000
    assert (info.device == "cpu") == bool(info.blas) == ON_CPU
    assert {layer.cache_kind for layer in info.layers} == {"append"}
    assert all(layer.key_dim == layer.value_dim == 64 for layer in info.layers)
    values = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in info.layers)
    assert (info.kv_bits, info.kv_group_size, info.kv_bytes_per_token) == (4, 64, values * 36 // 64)
    assert {"mlx", "mlx-lm"} <= info.versions.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_described_by_its_caches(name: str, folder_of: FolderOf) -> None:
    family = FAMILIES[name]
    info = load(folder_of(name), codecs=codecs_for(kv_group_size=family.group_size)).info
    members = [member for layer in info.layers for member in (layer.members or (layer,))]
    assert tuple(member.cache_kind for member in members) == family.kinds
    for member in members:
        assert member.window == (WINDOW if member.cache_kind == "window" else 0)
        assert (member.kv_heads > 0) == (member.cache_kind != "state")
    assert info.vocab_size == VOCAB


def test_keys_and_values_of_different_widths_are_told_apart(folder_of: FolderOf) -> None:
    coded = StreamInfo("affine4", 4, 64)
    expanded = load(folder_of("deepseek_v2")).info.layers
    assert expanded == (LayerInfo("append", kv_heads=2, key_dim=128, value_dim=64, keys=coded, values=coded),) * 2
    latent = load(folder_of("deepseek_v3")).info.layers
    assert latent == (LayerInfo("append", kv_heads=1, key_dim=128, value_dim=64, keys=coded, values=coded),) * 2


def test_without_quantisation_there_is_no_group(folder_of: FolderOf) -> None:
    info = load(folder_of("llama"), codecs=codecs_for(0)).info
    assert (info.kv_bits, info.kv_group_size) == (0, 0)


@pytest.mark.parametrize("shape", ["llama", "gemma3", "deepseek_v2", "hybrid"])
def test_random_shapes_are_the_same_every_time(shape: str) -> None:
    first, second = load(f"random:{shape}"), load(f"random:{shape}")
    assert first.info.kind is ModelKind.RANDOM
    assert first.info.fingerprint_fields == second.info.fingerprint_fields
    tokens = mx.array([[5, 6, 7]])
    assert mx.array_equal(first.model(tokens), second.model(tokens))


@pytest.mark.skipif(not ON_CPU, reason="other devices compute in the weights' own type")
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bit_weights_run_in_thirty_two_on_a_cpu(dtype: mx.Dtype, tmp_path: Path) -> None:
    weights = families.build("llama")
    weights.set_dtype(dtype)
    write_model(tmp_path / "model", FAMILIES["llama"].config, weights)
    loaded = load(tmp_path / "model")
    assert loaded.info.fingerprint_fields["dtype"] == "float32"
    assert loaded.model(mx.array([[5]])).dtype == mx.float32


def test_quantised_weights_are_served(tmp_path: Path) -> None:
    weights = families.build("llama")
    quantize(weights, group_size=64, bits=4)
    config = {**FAMILIES["llama"].config, "quantization": {"group_size": 64, "bits": 4}}
    write_model(tmp_path / "model", config, weights)
    loaded = load(tmp_path / "model")
    tokens = mx.array([[5, 6, 7]])
    assert mx.allclose(loaded.model(tokens), weights(tokens), atol=1e-4)


def test_ends_of_sequence_of_the_model_and_of_the_tokenizer(folder: Path) -> None:
    rewrite(folder / "config.json", eos_token_id=[2, 30])
    assert load(folder).info.eos_token_ids == {END, 2, 30}
    rewrite(folder / "generation_config.json", eos_token_id=[40])
    assert load(folder).info.eos_token_ids == {END, 40}
    rewrite(folder / "generation_config.json", eos_token_id=0)
    assert load(folder).info.eos_token_ids == {END, 0}


def test_sampling_defaults_are_what_the_author_recommends(folder: Path) -> None:
    assert load(folder).info.sampling_defaults == Sampling()
    rewrite(folder / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=None)
    assert load(folder).info.sampling_defaults == Sampling(temperature=0.6, top_p=0.95, top_k=20)
    rewrite(folder / "generation_config.json", do_sample=True, temperature=None, top_p=None, top_k=None)
    assert load(folder).info.sampling_defaults == Sampling(temperature=1.0)
    rewrite(folder / "generation_config.json", do_sample=False)
    assert load(folder).info.sampling_defaults == Sampling()


def test_a_lower_context_limit(folder: Path) -> None:
    assert load(folder, context_limit=100).info.context_limit == 100
    rewrite(folder / "config.json", max_position_embeddings=None)
    assert load(folder, context_limit=100_000).info.context_limit == 100_000


def test_a_model_of_the_hub_that_is_there_already(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network, by name and revision."""
    cache, commit = folder.parent / "hub", "a" * 40
    repository = cache / "models--some-org--some-model"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    info = load("some-org/some-model@v2").info
    assert (info.kind, info.model_id) == (ModelKind.HUB, "some-org/some-model@v2")
    assert info.fingerprint_fields == load(folder).info.fingerprint_fields
    with pytest.raises(OperatorError, match=r"some-org/some-model@v3.*could not be fetched"):
        load("some-org/some-model@v3")


# What makes it another model


def test_the_same_files_elsewhere_are_the_same_model(folder: Path, folder_of: FolderOf) -> None:
    rewrite(folder / "generation_config.json", do_sample=True)
    assert load(folder).info.fingerprint_fields == load(folder_of("llama")).info.fingerprint_fields


def change_one_weight(folder: Path) -> None:
    weights = read(folder / "model.safetensors")
    name = next(name for name in weights if "k_proj" in name)
    weights[name][0, 0] += 1e-3
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def add_a_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 4096, "content": "<|new|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


CHANGES: dict[str, tuple[Change, set[str]]] = {
    "a weight": (change_one_weight, {"weights"}),
    "a token": (add_a_token, {"tokenizer"}),
    "the template": (lambda f: rewrite(f / "tokenizer_config.json", chat_template="{{ messages }}"), {"tokenizer"}),
    "a template's own file": (lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), {"tokenizer"}),
    "positions": (lambda f: rewrite(f / "config.json", rope_theta=20000.0), {"config", "rope"}),
    "norms": (lambda f: rewrite(f / "config.json", rms_norm_eps=1e-6), {"config"}),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_what_the_kv_depends_on_is_in_the_fingerprint(changed: str, folder: Path, folder_of: FolderOf) -> None:
    change, fields = CHANGES[changed]
    change(folder)
    assert differing(load(folder_of("llama")), load(folder)) == fields


@pytest.mark.parametrize(
    ("codecs", "fields"),
    [
        (codecs_for(8), {"kv_bits"}),
        (codecs_for(4, 32), {"kv_group_size"}),
        (codecs_for(0), {"kv_bits", "kv_group_size"}),
    ],
)
def test_how_the_kv_is_quantised_is_in_the_fingerprint(
    codecs: CodecPlan, fields: set[str], folder_of: FolderOf
) -> None:
    assert differing(load(folder_of("llama")), load(folder_of("llama"), codecs=codecs)) == fields


def write_adapter(folder: Path, seed: int) -> Path:
    """LoRA weights for the keys of every layer."""
    folder.mkdir()
    rewrite(
        folder / "adapter_config.json",
        fine_tune_type="lora",
        num_layers=2,
        lora_parameters={"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.k_proj"]},
    )
    mx.random.seed(seed)
    weights = {}
    for layer in range(2):
        for half, shape in (("lora_a", (64, 4)), ("lora_b", (4, 64))):
            weights[f"model.layers.{layer}.self_attn.k_proj.{half}"] = mx.random.normal(shape)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder


def test_an_adapter_is_applied_and_is_in_the_fingerprint(folder_of: FolderOf, tmp_path: Path) -> None:
    plain = load(folder_of("llama"))
    first, second = [load(folder_of("llama"), adapter=write_adapter(tmp_path / str(seed), seed)) for seed in (1, 2)]
    assert differing(plain, first) == differing(first, second) == {"adapter"}
    tokens = mx.array([[5, 6, 7]])
    assert not mx.allclose(first.model(tokens), plain.model(tokens), atol=1e-3)
    assert not mx.allclose(first.model(tokens), second.model(tokens), atol=1e-3)


def differing(left: LoadedModel, right: LoadedModel) -> set[str]:
    ours, theirs = left.info.fingerprint_fields, right.info.fingerprint_fields
    assert ours.keys() == theirs.keys()
    return {field for field in ours if ours[field] != theirs[field]}


# What an operator can get wrong


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/nowhere/at/all", r"no model at '/nowhere/at/all'.*builtin:tiny.*folder.*ORG/NAME"),
        ("./nowhere", r"no model at './nowhere'"),
        ("~nobody/model", r"no model at '~nobody/model'"),
        ("tiny", r"no model at 'tiny'"),
        ("builtin:large", r"no built-in model 'large'.*builtin:tiny"),
        ("builtin:", r"no built-in model ''"),
        ("random:huge", r"no shape 'huge'.*llama-8b"),
    ],
)
def test_a_model_that_is_nowhere(spec: str, message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        load(spec)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BROKEN: dict[str, tuple[Change, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json.*mlx-lm's layout"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\*\.safetensors.*download complete"),
    "half the weights": (lambda f: truncate(f / "model.safetensors"), r"can't load the model"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), r"can't load the model"),
    "an unknown type": (lambda f: rewrite(f / "config.json", model_type="abacus"), r"can't load the model.*abacus"),
    "another shape": (lambda f: rewrite(f / "config.json", hidden_size=128), r"can't load the model"),
    "its own code": (lambda f: rewrite(f / "config.json", model_file="own.py"), r"can't load the model.*own\.py"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer could be loaded"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), r"no tokenizer could be loaded"),
    "broken defaults": (lambda f: (f / "generation_config.json").write_text("{"), r"is not valid JSON"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_folder_that_is_not_whole(broken: str, folder: Path) -> None:
    change, message = BROKEN[broken]
    change(folder)
    with pytest.raises(OperatorError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_more_positions_than_the_model_has(folder: Path) -> None:
    with pytest.raises(OperatorError, match=r"--context-limit 5000 .* 4096 positions.*at most 4096"):
        load(folder, context_limit=5000)


def test_a_head_that_does_not_divide_names_the_group_size_to_start_with(folder_of: FolderOf) -> None:
    with pytest.raises(OperatorError, match=r"dimension 96.*group size 64.*--kv-group-size 32"):
        load(folder_of("phi3_head_dim_96"))
    assert load(folder_of("phi3_head_dim_96"), codecs=codecs_for(kv_group_size=32)).info.kv_group_size == 32


def test_a_head_that_no_group_divides_is_served_unquantised(tmp_path: Path) -> None:
    config = {**FAMILIES["llama"].config, "head_dim": 40}
    write_model(tmp_path / "model", config, llama.Model(llama.ModelArgs.from_dict(config)))
    with pytest.raises(OperatorError, match=r"dimension 40.*--kv-bits 0"):
        load(tmp_path / "model")
    assert load(tmp_path / "model", codecs=codecs_for(0)).info.layers[0].key_dim == 40


def break_shape(adapter: Path) -> None:
    path = adapter / "adapters.safetensors"
    mx.save_safetensors(str(path), {name: array[:, :2] for name, array in read(path).items()})


def lose_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


@pytest.mark.parametrize("change", [shutil.rmtree, lose_config, break_shape])
def test_an_adapter_that_does_not_fit(change: Change, folder_of: FolderOf, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", 1)
    change(adapter)
    with pytest.raises(OperatorError, match=r"adapter in .* can't be put on this model"):
        load(folder_of("llama"), adapter=adapter)


def test_a_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OperatorError, match=r"some-org/some-model.*could not be fetched.*local folder") as caught:
        load("some-org/some-model")
    assert "\n" not in str(caught.value)


def test_the_built_in_folder_is_in_mlx_lms_layout() -> None:
    assert load(BUILT_IN / "tiny").info.fingerprint_fields == load("builtin:tiny").info.fingerprint_fields
