"""`warmkv agents export` and `import`: the same agent elsewhere, or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.kv.driver import FINGERPRINT, OTHER_MODEL, TENANT, Driver
from tests.kv.words import LAYOUTS, context
from tests.offline.commands import refusal, run, tree
from warmkv_server.contract.kv import KVLayout, Source
from warmkv_server.contract.names import AgentKey
from warmkv_server.errors import OperatorError
from warmkv_server.kv.index.index import Agent
from warmkv_server.kv.index.records import Fingerprint
from warmkv_server.offline import directory, importing, placing
from warmkv_server.offline.archive import ArchiveManifest, BadArchive
from warmkv_server.offline.directory import look
from warmkv_server.offline.verify import verify

TOKENS = context(900, [4] * 30, [5] * 40)


async def serve_once(data_dir: Path, layout: KVLayout, fingerprint: Fingerprint = FINGERPRINT) -> None:
    """Have the directory know its model."""
    driver = await Driver.open(data_dir, layout, fingerprint)
    await driver.close()


async def make_agent(data_dir: Path, layout: KVLayout) -> None:
    """Agent a: full blocks, segments, kept boundaries and snapshots."""
    driver = await Driver.open(data_dir, layout)
    await driver.put("a", TOKENS[:900], keep=[899, 900], labels={"team": "x"}, ttl=1000.0, pinned=True)
    await driver.put("a", TOKENS[:930], ending="assistant")
    await driver.put("a", TOKENS)
    await driver.close()


@pytest.fixture
async def archive(tmp_path: Path) -> Path:
    await make_agent(tmp_path / "from", LAYOUTS["everything"])
    path = tmp_path / "a.warmkv"
    result = run("agents", "export", "--data-dir", tmp_path / "from", "--tenant", TENANT, "a", "-o", path)
    assert result.exit_code == 0, result.output
    return path


def agent_of(data_dir: Path, tenant: str = TENANT, agent_id: str = "a") -> Agent:
    return look(data_dir).index.agents[AgentKey(tenant, agent_id)]


@pytest.mark.parametrize("name", LAYOUTS)
async def test_an_agent_moves_with_everything_that_is_its_own(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    await make_agent(tmp_path / "from", layout)
    await serve_once(tmp_path / "to", layout)
    before = tree(tmp_path / "from")
    file = tmp_path / "a.warmkv"
    assert run("agents", "export", "--data-dir", tmp_path / "from", "--tenant", TENANT, "a", "-o", file).exit_code == 0
    assert tree(tmp_path / "from") == before
    result = run("agents", "import", "--data-dir", tmp_path / "to", file, "--trust")
    assert result.exit_code == 0, result.output

    theirs, ours = agent_of(tmp_path / "from"), agent_of(tmp_path / "to")
    for each in ("tokens", "nodes", "snapshots", "partial", "incarnation", "last_used"):
        setattr(theirs, each, None)
    moved = dataclasses.replace(ours)
    for each in ("tokens", "nodes", "snapshots", "partial", "incarnation", "last_used"):
        setattr(moved, each, None)
    assert dataclasses.asdict(moved) == dataclasses.asdict(theirs)
    assert ours.revision == 3
    assert verify(lambda: look(tmp_path / "to")).problems == []
    copied = {path for path in tree(tmp_path / "to") if path.startswith("blocks")}
    assert copied == {path for path in before if path.startswith("blocks")}
    assert all((tmp_path / "to" / path).read_bytes() == before[path] for path in copied)

    driver = await Driver.open(tmp_path / "to", layout)
    reuse, committed = await driver.put("a", context(TOKENS.tolist(), [8] * 300), answer=True)
    assert (reuse.source, reuse.length) == (Source.WARM, len(TOKENS))
    assert (committed.agent.revision, committed.agent.labels) == (4, {"team": "x"})
    await driver.close()


async def test_in_another_tenant_the_words_are_the_same_under_other_names(archive: Path, tmp_path: Path) -> None:
    to, layout = tmp_path / "to", LAYOUTS["everything"]
    await serve_once(to, layout)
    result = run("agents", "import", "--data-dir", to, archive, "--tenant", "other", "--as", "b")
    assert result.exit_code == 0, result.output
    assert not {p for p in tree(to) if p.startswith("blocks")} & set(tree(tmp_path / "from"))
    assert verify(lambda: look(to)).problems == []
    store = (await Driver.open(to, layout)).store
    driver = Driver(store, layout, tenant="other")
    reuse = await driver.reuse("b", TOKENS)  # checks every word
    assert (reuse.source, reuse.length) == (Source.WARM, len(TOKENS))
    assert store.agent(TENANT, "a") is None
    assert (await Driver(store, layout).reuse("x", TOKENS)).length == 0
    await driver.close()


async def test_what_the_directory_has_already_is_shared(archive: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    driver = await Driver.open(to, LAYOUTS["everything"])
    await driver.put("b", TOKENS[:600])
    await driver.close()
    before = tree(to)
    assert run("agents", "import", "--data-dir", to, archive, "--trust").exit_code == 0
    after = tree(to)
    assert all(after[path] == content for path, content in before.items() if path.startswith("blocks"))
    shared = {node.id for node in agent_of(to).nodes if node.refs == 2}
    assert len(shared) == 2
    assert verify(lambda: look(to)).problems == []


def unchanged(data_dir: Path, *arguments: str | Path) -> str:
    before = tree(data_dir)
    said = refusal("agents", "import", "--data-dir", data_dir, *arguments)
    assert {path for path in tree(data_dir) if "blocks" in path} == {path for path in before if "blocks" in path}
    assert len(look(data_dir).index.agents) <= 1
    return said


async def test_an_existing_agent_is_not_replaced_unasked(archive: Path, tmp_path: Path) -> None:
    to, layout = tmp_path / "to", LAYOUTS["everything"]
    driver = await Driver.open(to, layout)
    await driver.put("a", context([7] * 700))
    await driver.close()
    assert "give --as NEW_ID, or --replace" in unchanged(to, archive)
    assert agent_of(to).tokens.tolist() == [7] * 700
    assert run("agents", "import", "--data-dir", to, archive, "--replace", "--trust").exit_code == 0
    assert np.array_equal(agent_of(to).tokens, TOKENS)
    assert {p for p in tree(to) if p.startswith("blocks")} == {
        p for p in tree(tmp_path / "from") if p.startswith("blocks")
    }
    driver = await Driver.open(to, layout)
    assert (await driver.reuse("a", TOKENS)).length == len(TOKENS)
    await driver.close()


async def test_another_model_is_refused_and_the_difference_named(archive: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    await serve_once(to, LAYOUTS["everything"], OTHER_MODEL)
    assert "it differs in weights (w1 in the archive, w2 here)" in unchanged(to, archive)
    assert "was not served with a model yet" in refusal("agents", "import", "--data-dir", tmp_path / "new", archive)
    assert not (tmp_path / "new").exists()
    assert "--kv-bits goes with --model" in unchanged(to, archive, "--kv-bits", "8")


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :]


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "in the manifest": lambda raw: flipped(raw, 700),
    "in the first block": lambda raw: flipped(raw, raw.index(b"blocks/") + 4000),
    "in the last block": lambda raw: flipped(raw, raw.rindex(b"blocks/") + 700),
    "cut off in a block": lambda raw: raw[: len(raw) * 2 // 3],
    "cut off between blocks": lambda raw: raw[: raw.rindex(b"blocks/")],
    "cut off in the manifest": lambda raw: raw[:600],
    "empty": lambda _: b"",
    "something else": lambda _: b"hello" * 1000,
    "a name that leads elsewhere": lambda raw: raw.replace(b"blocks/", b"/../../", 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_archive_changes_nothing(archive: Path, tmp_path: Path, damage: str) -> None:
    to = tmp_path / "to"
    await serve_once(to, LAYOUTS["everything"])
    rewrite(archive, DAMAGES[damage])
    assert "nothing was changed" in unchanged(to, archive)
    assert look(to).index.agents == {}


def test_nodes_that_make_another_context_are_refused(archive: Path) -> None:
    """Right checksums don't make a context."""
    view = look(archive.parent / "from")
    agent = view.index.agents[AgentKey(TENANT, "a")]
    whole = ArchiveManifest.of(agent, FINGERPRINT)
    placing.check(whole)
    assert ArchiveManifest.decode(whole.encode()).encode() == whole.encode()
    for wrong in (
        dataclasses.replace(whole, nodes=whole.nodes[1:]),
        dataclasses.replace(whole, nodes=(whole.nodes[0], *whole.nodes[2:])),
        dataclasses.replace(whole, nodes=(*whole.nodes, whole.nodes[-1])),
        dataclasses.replace(whole, snapshots=(*whole.snapshots, whole.nodes[0])),
        dataclasses.replace(whole, nodes=whole.nodes[:2]),
        dataclasses.replace(whole, fingerprint=OTHER_MODEL),
    ):
        with pytest.raises(BadArchive):
            placing.check(wrong)


async def test_what_is_lost_is_said_and_the_rest_moves(tmp_path: Path) -> None:
    source, to, layout = tmp_path / "from", tmp_path / "to", LAYOUTS["append"]
    await make_agent(source, layout)
    await serve_once(to, layout)
    victim = agent_of(source).nodes[2]
    (path,) = source.glob(f"blocks/*/{victim.id.hex()}.append.*.safetensors")
    rewrite(path, lambda raw: flipped(raw, 3000))
    export = ("agents", "export", "--data-dir", source, "--tenant", TENANT, "a", "-o", tmp_path / "a.warmkv")
    assert "is bad" in refusal(*export)
    assert [p.name for p in tmp_path.glob("a.warmkv*")] == []  # noqa: ASYNC240
    assert run("store", "verify", "--quarantine", "--data-dir", source).exit_code == 1
    assert "458 of them without KV" in run(*export).stdout
    assert "exists already" in refusal(*export)
    assert "458 of them without KV" in run("agents", "import", "--data-dir", to, tmp_path / "a.warmkv").stdout
    driver = await Driver.open(to, layout)
    reuse, _ = await driver.put("a", TOKENS)
    assert reuse.length == 512
    assert (await driver.reuse("a", TOKENS)).length == len(TOKENS)
    await driver.close()


async def test_import_needs_the_directory_and_export_does_not(archive: Path, tmp_path: Path) -> None:
    driver = await Driver.open(tmp_path / "from", LAYOUTS["everything"])
    await driver.put("a", TOKENS[:100])
    again = tmp_path / "again.warmkv"
    result = run("agents", "export", "--data-dir", tmp_path / "from", "--tenant", TENANT, "a", "-o", again)
    assert "revision 4, 100 tokens" in result.stdout
    assert "in use by process" in refusal("agents", "import", "--data-dir", tmp_path / "from", archive, "--as", "b")
    await driver.close()


def test_names_are_checked(archive: Path) -> None:
    source = archive.parent / "from"
    said = refusal("agents", "export", "--data-dir", source, "a", "-o", archive.with_name("x"))
    assert "tenant 't' has one: give --tenant" in said
    assert "can't be an agent_id" in refusal("agents", "import", "--data-dir", source, archive, "--as", "../b")


async def test_a_disk_that_refuses_leaves_everything_as_it_was(archive: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    await serve_once(to, LAYOUTS["everything"])
    with importing.opened(archive) as reader, directory.take(to) as taken:
        taken.database.query("PRAGMA query_only = 1")
        with pytest.raises(OperatorError, match="nothing was changed"):
            importing.import_agent(
                reader,
                taken,
                fingerprint=reader.manifest.fingerprint,
                tenant=TENANT,
                agent_id="a",
                replace=False,
                trust=False,
                specs=None,
                vocabulary=None,
            )
    assert [path for path in tree(to) if path.startswith("blocks")] == []
    assert look(to).index.agents == {}
