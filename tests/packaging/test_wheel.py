"""The distribution: what the wheel holds, and how it behaves where only the client's packages are installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.e2e.harness import serving

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "warmkv": "stubs",
    "warmkv_server": "server",
    "warmkv_bench": "bench",
    "warmkv_evaluation": "evaluation",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, unpacked."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for folder in PACKAGES.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    subprocess.run(build, cwd=tree, check=True, capture_output=True)
    (archive,) = (tree / "dist").glob("*.whl")
    unpacked = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(archive).extractall(unpacked)
    return unpacked


@pytest.fixture(scope="module")
def client_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A Python command in which the wheel and what it needs are the only packages beside the standard library."""
    installed = Path(sysconfig.get_path("platlib"))
    site = tmp_path_factory.mktemp("site")
    (site / "google").mkdir()
    for name in ("grpc", "grpc_status", "typing_extensions.py", "google/protobuf", "google/_upb", "google/rpc"):
        (site / name).symlink_to(installed / name)
    path = f"import sys; sys.path[:0] = [{str(wheel)!r}, {str(site)!r}]; "
    return [sys.executable, "-I", "-S", "-c", path]


def _run(python: list[str], program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*python[:-1], python[-1] + program], capture_output=True, text=True, check=False)


def test_top_level_is_our_packages_alone(wheel: Path) -> None:
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == PACKAGES.keys()


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    for package, folder in PACKAGES.items():
        in_tree = {path.relative_to(ROOT / folder) for path in (ROOT / folder / package).rglob("*.py")}
        assert {path.relative_to(wheel) for path in (wheel / package).rglob("*.py")} == in_tree
        assert (wheel / package / "py.typed").exists()


def test_types_and_the_built_in_model_are_in_the_wheel(wheel: Path) -> None:
    data = {path for path in (ROOT / "server/warmkv_server/models/tiny").iterdir() if path.is_file()}
    shipped = {path.name for path in (wheel / "warmkv_server/models/tiny").iterdir() if path.is_file()}
    assert {path.name for path in data} == shipped
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= shipped
    assert any(name.endswith(".safetensors") for name in shipped)
    for stub in (ROOT / "stubs/warmkv/v1").glob("*.pyi"):
        assert (wheel / "warmkv/v1" / stub.name).exists()


def test_wheel_without_extras_requires_grpc_and_protobuf_alone(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    fields = Parser().parsestr(metadata.read_text())
    base = [value for value in fields.get_all("Requires-Dist", []) if "extra ==" not in value]
    assert sorted(re.split(r"[<>=]", value)[0] for value in base) == ["grpcio", "grpcio-status", "protobuf"]
    assert set(fields.get_all("Provides-Extra", [])) == {"server", "cpu", "cuda13", "otel", "smg", "bench", "dev"}


def test_stubs_need_grpcio_and_protobuf_alone(client_only: list[str]) -> None:
    outcome = _run(client_only, "from warmkv import v1; print(v1.PrimeRequest(agent_id='a').agent_id)")
    assert outcome.stdout == "a\n", outcome.stderr


def test_the_client_alone_talks_to_a_server(client_only: list[str], tmp_path: Path) -> None:
    program = """
from warmkv.client import Client, WarmKVError

with Client(ADDRESS) as client:
    print(bool(client.chat("a", "Hello!", max_tokens=4).text))
    try:
        client.get("nobody at all")
    except WarmKVError as error:
        print(error.reason, *error.fields)
"""
    with serving(tmp_path / "data") as (server, _):
        outcome = _run(client_only, program.replace("ADDRESS", repr(server.address)))
    assert outcome.stdout.split() == ["True", "INVALID_FIELD", "agent_id"], outcome.stderr


def test_command_without_the_server_says_what_to_install(client_only: list[str]) -> None:
    outcome = _run(client_only, "from warmkv_server.main import main; main()")
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert "pip install '.[server]'" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_the_changelog_begins_with_the_version_that_is_built(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    version = Parser().parsestr(metadata.read_text())["Version"]
    found = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == version
