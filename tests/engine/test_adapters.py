"""Adapters in PEFT's format: the products that PEFT would compute, or a refusal."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.engine.conftest import FolderOf
from tests.engine.test_model import load, read, rewrite, write_adapter
from warmkv_server.errors import OperatorError

KEYS, VALUES = "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"
RANK, TOKENS = 4, mx.array([[5, 6, 7]])


def write_peft(folder: Path, **changes: Any) -> Path:
    """Random matrices for the keys and values of one layer."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 12, "target_modules": ["k_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    mx.random.seed(5)
    weights = {}
    for name in (KEYS, VALUES):
        weights[f"base_model.model.{name}.lora_A.weight"] = mx.random.normal((RANK, 64))
        weights[f"base_model.model.{name}.lora_B.weight"] = mx.random.normal((64, RANK))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), weights)
    return folder


@pytest.mark.parametrize(
    ("changes", "keys", "values"),
    [
        ({}, 12 / RANK, 12 / RANK),
        ({"use_rslora": True}, 12 / math.sqrt(RANK), 12 / math.sqrt(RANK)),
        ({"alpha_pattern": {"k_proj": 6}}, 6 / RANK, 12 / RANK),
        ({"r": 16, "rank_pattern": {"k_proj": RANK, "self_attn.v_proj": RANK}}, 12 / RANK, 12 / RANK),
    ],
)
def test_it_is_the_same_as_merged_weights(
    changes: dict[str, Any], keys: float, values: float, folder_of: FolderOf, tmp_path: Path
) -> None:
    adapter = write_peft(tmp_path / "adapter", **changes)
    merged = Path(shutil.copytree(folder_of("llama"), tmp_path / "merged"))
    weights, low = read(merged / "model.safetensors"), read(adapter / "adapter_model.safetensors")
    for name, scale in ((KEYS, keys), (VALUES, values)):
        a, b = (low[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * (b @ a)
    mx.save_safetensors(str(merged / "model.safetensors"), weights)
    adapted = load(folder_of("llama"), adapter=adapter)
    assert mx.allclose(adapted.model(TOKENS), load(merged).model(TOKENS), atol=1e-3)
    assert adapted.info.fingerprint_fields["adapter"] != ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"PEFT's type IA3"),
        ({"use_dora": True}, r"PEFT's format with use_dora"),
        ({"bias": "all"}, r"PEFT's format with bias"),
        ({"modules_to_save": ["lm_head"]}, r"PEFT's format with modules_to_save"),
        ({"init_lora_weights": "pissa_niter_16"}, r"PEFT's format with init_lora_weights"),
        ({"r": 8}, r"PEFT's LoRA matrices of model\.layers\.1\.self_attn\.[kv]_proj .* another rank"),
    ],
)
def test_what_is_more_than_two_matrices_is_refused(
    changes: dict[str, Any], message: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    with pytest.raises(OperatorError, match=message):
        load(folder_of("llama"), adapter=write_peft(tmp_path / "adapter", **changes))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.model.embed_tokens.weight", r"embed_tokens\.weight, which is no LoRA matrix"),
        ("base_model.model.model.layers.7.self_attn.k_proj.lora_A.weight", r"one LoRA matrix of .*layers\.7"),
    ],
)
def test_a_tensor_without_a_home_is_refused(name: str, message: str, folder_of: FolderOf, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "adapter")
    weights = {**read(adapter / "adapter_model.safetensors"), name: mx.zeros((RANK, 64))}
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), weights)
    with pytest.raises(OperatorError, match=message):
        load(folder_of("llama"), adapter=adapter)


def test_a_module_that_the_model_lacks_is_refused(folder_of: FolderOf, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "adapter")
    weights = read(adapter / "adapter_model.safetensors")
    renamed = {name.replace("k_proj", "qkv_proj"): array for name, array in weights.items()}
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), renamed)
    with pytest.raises(OperatorError, match=r"changes model\.layers\.1\.self_attn\.qkv_proj, which is no linear layer"):
        load(folder_of("llama"), adapter=adapter)


def test_a_matrix_that_mlx_lms_own_adapter_lacks_is_not_a_random_one(folder_of: FolderOf, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", 1)
    weights = read(adapter / "adapters.safetensors")
    missing = next(name for name in weights if name.endswith("lora_a"))
    del weights[missing]
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    with pytest.raises(OperatorError, match=rf"lacks {missing}; is it whole"):
        load(folder_of("llama"), adapter=adapter)
    rewrite(adapter / "adapter_config.json", lora_parameters={"rank": 4})
    with pytest.raises(OperatorError, match=r"can't be put on this model"):
        load(folder_of("llama"), adapter=adapter)
