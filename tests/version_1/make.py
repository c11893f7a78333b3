"""Makes the data directories of format 1 that lie here, with the last code that wrote that format:

    git worktree add ../one COMMIT      (the last one at which `blockfile.py` says VERSION = 1)
    cp -r tests/version_1 ../one/tests/
    cd ../one && python -m tests.version_1.make

`store.tar.xz` is a store of the stand-in words of tests/kv, with every kind of KV; `served.tar.xz` is what a server
left that ran the built-in model on a CPU; `agent.tar` is an agent of the first, exported.
"""

from __future__ import annotations

import asyncio
import tarfile
import tempfile
from pathlib import Path

from tests.e2e.harness import serving, token_ids
from tests.kv.driver import TENANT, Driver
from tests.kv.words import LAYOUTS, context
from warmkv_server.kv.index.records import RequestOutcome
from warmkv_server.offline.directory import look
from warmkv_server.offline.exporting import export

HERE = Path(__file__).parent
SERVED_TOKENS = [5 + n * 7 % 4000 for n in range(270)]


async def make_store(data_dir: Path) -> None:
    driver = await Driver.open(data_dir, LAYOUTS["everything"])
    answered = RequestOutcome("request", b"hash", b"answer")
    await driver.put("a", context(300), keep=[256], request=answered, ending="turn")
    await driver.store.fork(TENANT, "a", "fork")
    await driver.store.update(TENANT, "fork", pinned=True, labels={"k": "v"})
    await driver.put("small", context([9] * 40))
    await driver.close()


def pack(data_dir: Path, name: str) -> None:
    with tarfile.open(HERE / name, "w:xz") as tar:
        for path in sorted(data_dir.rglob("*")):
            if path.is_file() and path.name not in ("lock", "reserve", "index.readers"):
                tar.add(path, path.relative_to(data_dir))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, served = Path(folder, "store"), Path(folder, "served")
        asyncio.run(make_store(store))
        export(look(store), TENANT, "small", HERE / "agent.tar")
        pack(store, "store.tar.xz")
        with serving(served) as (server, client):
            client.prime("a", token_ids(SERVED_TOKENS))
            assert server.terminate() == 0
        pack(served, "served.tar.xz")


if __name__ == "__main__":
    main()
