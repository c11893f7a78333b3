"""What `warmkv store verify` and `ls` say of the agents' manifests, and `gc` of indexes that were put aside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kv.driver import TENANT, Driver
from tests.kv.test_rebuild import lose_index, manifest_of, ruin_index
from tests.kv.words import LAYOUTS
from tests.offline.commands import run, run_json, verify
from warmkv_server.kv.catalog.manifest import decode, encode
from warmkv_server.offline.findings import Trouble

LAYOUT = LAYOUTS["everything"]


def test_good_ones_are_counted_and_listed(data_dir: Path) -> None:
    assert "2 manifests and 2 agents: nothing is wrong" in run("store", "verify", "--data-dir", data_dir).stdout
    sizes = [manifest_of(data_dir, agent).stat().st_size for agent in "ab"]
    told = run_json("store", "ls", "--data-dir", data_dir)
    assert (told["manifest_files"], told["manifest_bytes"]) == (2, sum(sizes))
    assert "; 2 manifests with " in run("store", "ls", "--data-dir", data_dir).stdout


def changed(path: Path, **changes: Any) -> bytes:
    """The manifest with other contents and a right checksum."""
    return encode(dataclasses.replace(decode(path.read_bytes()), **changes))


Harm = Callable[[Path], bytes]
HARMS: dict[str, tuple[Trouble, str, Harm]] = {
    "a flipped bit": (
        Trouble.DAMAGED,
        "the checksum is another",
        lambda path: path.read_bytes()[:-9] + bytes([path.read_bytes()[-9] ^ 1]) + path.read_bytes()[-8:],
    ),
    "cut off": (Trouble.DAMAGED, "the checksum is another", lambda path: path.read_bytes()[:-1]),
    "empty": (Trouble.DAMAGED, "there is none", lambda _: b""),
    "of another agent": (
        Trouble.DAMAGED,
        "the manifest of agent 'b' of tenant 't', under another name",
        lambda path: changed(path, agent_id="b"),
    ),
    "of blocks that nobody has": (
        Trouble.NOT_REBUILDABLE,
        "would be lost with the index: no file has its tokens 0 to 256",
        lambda path: changed(path, blocks=("ab" * 16, *decode(path.read_bytes()).blocks[1:])),
    ),
    "of blocks in another order": (
        Trouble.NOT_REBUILDABLE,
        "no file has its tokens 0 to 256",
        lambda path: changed(path, blocks=decode(path.read_bytes()).blocks[::-1]),
    ),
    "of another tenant's blocks": (
        Trouble.NOT_REBUILDABLE,
        "are not its own",
        lambda path: changed(path, fingerprint="0" * 32),
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_each_harm_is_named_with_its_file(data_dir: Path, harm: str) -> None:
    trouble, why, inflict = HARMS[harm]
    path = manifest_of(data_dir, "a")
    path.write_bytes(inflict(path))
    (problem,) = verify(data_dir).problems
    assert (problem.trouble, problem.subject) == (trouble, f"agents/{path.name}")
    assert why in problem.detail
    result = run("store", "verify", "--data-dir", data_dir)
    assert result.exit_code == 1
    assert f"{trouble}: agents/{path.name}: " in result.stdout


async def test_a_server_puts_a_damaged_one_right(data_dir: Path) -> None:
    manifest_of(data_dir, "a").write_bytes(b"{}")
    driver = await Driver.open(data_dir, LAYOUT)
    await driver.close()
    assert verify(data_dir).problems == []


def test_one_of_an_agent_that_the_index_does_not_have(data_dir: Path) -> None:
    path = manifest_of(data_dir, "nobody")
    path.write_bytes(changed(manifest_of(data_dir, "a"), agent_id="nobody"))
    (problem,) = verify(data_dir).problems
    assert (problem.trouble, problem.subject) == (Trouble.UNKNOWN, f"agents/{path.name}")
    assert "agent 'nobody' of tenant 't'" in problem.detail


def test_leftovers_and_what_a_crash_may_leave_are_notes(data_dir: Path) -> None:
    path = manifest_of(data_dir, "a")
    path.with_name(f"{path.name}.3.tmp").write_bytes(b"half")
    path.with_name("notes.txt").write_text("hello")
    path.write_bytes(changed(path, revision=5))
    manifest_of(data_dir, "b").unlink()
    report = verify(data_dir)
    assert report.problems == []
    assert (report.manifests, len(report.notes)) == (1, 3)
    assert any("2 of 2 agents have no manifest, or one that is behind" in note for note in report.notes)


def test_tokens_that_only_the_index_has_are_a_note_until_they_are_in_the_manifest(data_dir: Path) -> None:
    blocks = decode(manifest_of(data_dir, "b").read_bytes()).blocks
    for path in data_dir.glob(f"blocks/*/{blocks[0]}.*"):
        path.unlink()
    report = verify(data_dir)
    assert {problem.trouble for problem in report.problems} == {Trouble.MISSING, Trouble.INCOMPLETE}
    assert any("agent 'b' of tenant 't' would be lost if the index were lost as well" in note for note in report.notes)
    run("store", "verify", "--quarantine", "--data-dir", data_dir)
    assert not any("would be lost" in note for note in verify(data_dir).notes)


def put_aside(data_dir: Path) -> list[Path]:
    return [path for word in ("damaged", "replaced") for path in data_dir.glob(f"index.sqlite.{word}-*")]


@pytest.mark.parametrize("lose", [ruin_index, lose_index])
async def test_gc_removes_indexes_that_were_put_aside_when_the_quarantine_is_named(
    data_dir: Path, lose: Callable[[Path], None]
) -> None:
    lose(data_dir)
    driver = await Driver.open(data_dir, LAYOUT)  # "damaged", where there was one
    await driver.close()
    run("store", "rebuild-index", "--data-dir", data_dir)  # "replaced"
    aside = put_aside(data_dir)
    assert len(aside) == (2 if lose is ruin_index else 1)
    nbytes = sum(path.stat().st_size for path in aside)
    assert run_json("store", "ls", "--data-dir", data_dir)["aside_bytes"] == nbytes
    assert "indexes that were put aside" in run("store", "ls", "--data-dir", data_dir).stdout
    run("store", "gc", "--data-dir", data_dir)
    assert all(path.exists() for path in aside)
    told = run_json("store", "gc", "--quarantine", "--dry-run", "--data-dir", data_dir)
    assert told["files"]["files of indexes that were put aside"] == {"count": len(aside), "bytes": nbytes}
    assert all(path.exists() for path in aside)
    said = run("store", "gc", "--quarantine", "--data-dir", data_dir).stdout
    assert f"remove files of indexes that were put aside: {len(aside)}" in said
    assert not any(path.exists() for path in aside)
    driver = await Driver.open(data_dir, LAYOUT)
    assert driver.store.agent(TENANT, "a") is not None
    await driver.close()
