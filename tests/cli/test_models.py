"""`warmkv models ls`, `pull` and `rm`, on a cache made as huggingface_hub makes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from warmkv_server.cli.main import app

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with two revisions that share their weights, and a data set, which is none."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "weights").write_bytes(b"w" * 5000)
    for revision, config in ((FIRST, "old"), (SECOND, "new")):
        (repo / "blobs" / config).write_bytes(b"{}")
        snapshot = repo / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
        (snapshot / "config.json").symlink_to(f"../../blobs/{config}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SECOND)
    data = tmp_path / "datasets--org--name" / "snapshots" / FIRST
    data.mkdir(parents=True)
    (data / "data.txt").write_text("some")
    return tmp_path


def run(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, ["models", *arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def test_what_is_there(cache: Path) -> None:
    told = json.loads(run("ls", "--json").stdout)
    assert told["cache"] == str(cache)
    assert {(m["name"], m["revision"], tuple(m["refs"]), m["nbytes"]) for m in told["models"]} == {
        ("org/name", FIRST, (), 5002),
        ("org/name", SECOND, ("main",), 5002),
    }
    assert f"org/name@{SECOND[:12]}" in run("ls").stdout


def test_a_revision_goes_and_leaves_what_the_other_needs(cache: Path) -> None:
    assert f"org/name@{FIRST[:12]}: removed\n2 B freed" in run("rm", f"org/name@{FIRST[:6]}").stdout
    (left,) = json.loads(run("ls", "--json").stdout)["models"]
    assert left["revision"] == SECOND
    assert json.loads(run("rm", "org/name", "--json").stdout)["freed_bytes"] == 5002
    assert "0 models" in run("ls").stdout
    assert (cache / "datasets--org--name").exists()


@pytest.mark.parametrize("name", ["org/other", "org/name@3", "org/name@tag"])
@pytest.mark.usefixtures("cache")
def test_what_is_not_there_cannot_be_removed(name: str) -> None:
    result = run("rm", name, status=2)
    assert f"has no {name}" in result.stderr
    assert json.loads(run("ls", "--json").stdout)["models"]


def test_no_cache_has_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert "0 models" in run("ls").stdout


@pytest.mark.usefixtures("cache")
def test_pull_takes_what_is_there_and_refuses_what_is_no_hubs() -> None:
    assert "is on this machine already" in run("pull", "builtin:tiny", status=2).stderr
    assert "could not be fetched" in run("pull", "org/unknown", status=2).stderr
