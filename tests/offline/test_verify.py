"""`warmkv store verify`: finds what is wrong and only that, beside a working store too."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kv.driver import TENANT, Driver
from tests.kv.words import LAYOUTS, context
from tests.offline.commands import refusal, run, tree, verify
from warmkv_server.contract.kv import Fallback, PartKind
from warmkv_server.contract.names import AgentKey
from warmkv_server.kv.blocks import blockfile
from warmkv_server.kv.blocks.names import object_name
from warmkv_server.offline.directory import look
from warmkv_server.offline.findings import Trouble

LAYOUT = LAYOUTS["everything"]


def file_of(data_dir: Path, agent: str, start: int) -> Path:
    """The append file of the agent's block that starts there."""
    nodes = look(data_dir).index.agents[AgentKey(TENANT, agent)].nodes
    (ident,) = (node.id.hex() for node in nodes if node.start == start)
    (path,) = (data_dir / "blocks" / ident[:2]).glob(f"{ident}.append.*.safetensors")
    return path


def flip(path: Path, at: int = -5) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x40
    path.write_bytes(raw)


def test_a_good_directory_is_good_and_is_left_alone(data_dir: Path) -> None:
    before = tree(data_dir)
    result = run("store", "verify", "--data-dir", data_dir)
    assert (result.exit_code, "nothing is wrong" in result.stdout) == (0, True), result.output
    assert tree(data_dir) == before
    report = verify(data_dir)
    assert report.files == sum(name.startswith("blocks") for name in before)
    assert (report.agents, report.problems, report.notes) == (2, [], [])


Harm = Callable[[Path], Any]
HARMS: dict[str, tuple[Trouble, Harm]] = {
    "a flipped bit of the payload": (Trouble.DAMAGED, flip),
    "a flipped bit of the header": (Trouble.DAMAGED, lambda path: flip(path, 200)),
    "cut off": (Trouble.DAMAGED, lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "longer": (Trouble.DAMAGED, lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "empty": (Trouble.DAMAGED, lambda path: path.write_bytes(b"")),
    "of another format": (
        Trouble.DAMAGED,
        lambda path: path.write_bytes(
            path.read_bytes().replace(blockfile.FORMAT.encode(), b"x" * len(blockfile.FORMAT))
        ),
    ),
    "gone": (Trouble.MISSING, Path.unlink),
}


@pytest.mark.parametrize("harm", HARMS)
def test_each_harm_is_named_with_its_file_and_its_agent(data_dir: Path, harm: str) -> None:
    trouble, inflict = HARMS[harm]
    path = file_of(data_dir, "a", 512)
    inflict(path)
    report = verify(data_dir)
    assert [(p.trouble, Path(p.subject).name) for p in report.problems[:1]] == [(trouble, path.name)]
    (agent,) = report.problems[1:]
    assert (agent.trouble, agent.subject) == (Trouble.INCOMPLETE, f"agent 'a' of tenant '{TENANT}'")
    assert "at most 512 of its 1000 tokens" in agent.detail
    result = run("store", "verify", "--data-dir", data_dir)
    assert result.exit_code == 1
    assert f"{trouble}: blocks/{path.parent.name}/{path.name}: " in result.stdout


def test_a_file_of_another_context_is_no_substitute(data_dir: Path) -> None:
    """Whole, with a right checksum, in the wrong place."""
    file_of(data_dir, "a", 0).write_bytes(file_of(data_dir, "b", 0).read_bytes())
    (problem, _) = verify(data_dir).problems
    assert problem.trouble is Trouble.DAMAGED
    assert "under another name" in problem.detail


def test_another_version_of_a_block_is_one_that_the_index_does_not_know(data_dir: Path) -> None:
    """The same context with other words, whole in itself: it has another name, and the index knows which one is its."""
    path = file_of(data_dir, "a", 256)
    raw = bytearray(path.read_bytes())
    start = blockfile.header_size(bytes(raw[: blockfile.LENGTH_BYTES]), len(raw))
    raw[-1] ^= 1
    head, payload = raw[:start], raw[start:]
    digest = blockfile.put_checksum(head, [memoryview(payload)])
    name = object_name(path.name[:32], PartKind.APPEND, digest)
    path.with_name(name).write_bytes(head + payload)
    (problem,) = verify(data_dir).problems
    assert problem.trouble is Trouble.UNKNOWN
    assert problem.subject.endswith(name)
    path.write_bytes(head + payload)  # under the other's name
    assert "under another name" in verify(data_dir).problems[0].detail


def test_a_header_that_says_what_can_not_be_is_damage(data_dir: Path) -> None:
    """With a right checksum, as somebody else's program might write it."""
    path = file_of(data_dir, "a", 256)
    content = path.read_bytes()
    info = dataclasses.replace(blockfile.verify(content).info, start=-256)
    head, payload, _ = blockfile.renamed(content, info)
    path.write_bytes(bytes(head) + payload)
    problem = verify(data_dir).problems[0]
    assert (problem.trouble, problem.detail) == (Trouble.DAMAGED, "no context has a token -256")


def test_leftovers_are_notes_and_a_copy_elsewhere_is_a_problem(data_dir: Path) -> None:
    path = file_of(data_dir, "a", 0)
    (path.parent / f"{path.name}.7.tmp").write_bytes(b"half")
    (path.parent / "notes.txt").write_text("hello")
    report = verify(data_dir)
    assert (len(report.notes), report.problems) == (2, [])
    whole = file_of(data_dir, "b", 0)
    stray = data_dir / "blocks" / "00" / whole.name
    stray.write_bytes(whole.read_bytes())
    (problem,) = verify(data_dir).problems
    assert (problem.trouble, problem.subject) == (Trouble.DAMAGED, f"blocks/00/{whole.name}")


async def test_what_the_index_does_not_know_is_said(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    driver = await Driver.open(other, LAYOUT)
    await driver.put("c", context([5] * 200))
    strange = file_of(other, "c", 0)
    (data_dir / "blocks" / strange.parent.name / strange.name).write_bytes(strange.read_bytes())
    (problem,) = verify(data_dir).problems
    assert problem.trouble is Trouble.UNKNOWN
    await driver.close()


async def test_quarantine_puts_bad_files_away_and_the_rest_is_reused(data_dir: Path) -> None:
    flip(file_of(data_dir, "a", 512))
    file_of(data_dir, "b", 256).unlink()
    result = run("store", "verify", "--quarantine", "--data-dir", data_dir)
    assert result.exit_code == 1
    assert "moved to quarantine: 1" in result.stdout
    assert len(list((data_dir / "quarantine").iterdir())) == 1
    again = verify(data_dir)
    assert [(p.trouble, p.subject) for p in again.problems] == [(Trouble.INCOMPLETE, f"agent 'a' of tenant '{TENANT}'")]
    assert len(again.notes) == 1
    driver = await Driver.open(data_dir, LAYOUT)
    assert (await driver.reuse("a", context(1000))).fallback is Fallback.QUARANTINED
    await driver.close()


async def test_quarantine_needs_the_directory_and_says_who_has_it(data_dir: Path) -> None:
    driver = await Driver.open(data_dir, LAYOUT)
    assert "in use by process" in refusal("store", "verify", "--quarantine", "--data-dir", data_dir)
    await driver.close()


async def test_beside_a_busy_store_nothing_is_wrong(tmp_path: Path) -> None:
    """Files that come and go meanwhile are no problem, and looking doesn't disturb the store."""
    driver = await Driver.open(tmp_path, LAYOUT)
    await driver.put("0", context(1000))
    done = asyncio.Event()

    async def work() -> int:
        turn = 0
        tokens = context(1000)
        while not done.is_set():
            turn += 1
            tokens = context(tokens.tolist(), [turn] * 20)
            await driver.put("0", tokens)
            await driver.put(str(turn), context([turn] * 300))
            if turn > 3:
                await driver.store.delete(TENANT, str(turn - 3))
        return turn

    working = asyncio.create_task(work())
    for _ in range(15):
        report = await asyncio.to_thread(verify, tmp_path)
        assert report.problems == []
        assert report.files
    done.set()
    assert await working > 5
    await driver.close()
    assert verify(tmp_path).problems == []
