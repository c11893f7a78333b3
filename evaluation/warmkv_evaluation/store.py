"""`warmkv eval store`: the store's own figures, on the disk that matters, with no model's weights."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from warmkv_evaluation.store_growth import Growth, grow
from warmkv_evaluation.store_load import LoadTimes
from warmkv_evaluation.store_load import measure as measure_load
from warmkv_evaluation.store_rest import Rest, rest
from warmkv_evaluation.store_save import Save
from warmkv_evaluation.store_save import measure as measure_save
from warmkv_evaluation.store_shapes import BUILTIN, shape_of
from warmkv_evaluation.store_tables import (
    growth_table,
    join_lines,
    load_table,
    rest_table,
    save_table,
    steps_table,
)
from warmkv_server.platform.versions import version_of

LARGE = "llama-3.1-8b"
AT_REST = (LARGE, "gemma-3-12b", "deepseek-v2-lite")
GROUP_SIZES = (64, 32)
TURN = 100


class Part(StrEnum):
    GROWTH = "growth"
    LOAD = "load"
    REST = "rest"
    SAVE = "save"


@dataclass(frozen=True)
class Extent:
    """How much is measured. Counts of samples, and tokens.

    Attributes:
        contexts: lengths that are loaded; the largest is also grown to and saved.
        rest_tokens: of the contexts at rest.
    """

    contexts: tuple[int, ...] = (4096, 32768)
    rest_tokens: int = 8192
    repeats: int = 15
    commits: int = 40
    joins: int = 3
    rounds: int = 20


@dataclass
class StoreReport:
    """Everything measured so far."""

    environment: dict[str, Any]
    extent: Extent
    growth: list[Growth] = field(default_factory=list)
    load: list[LoadTimes] = field(default_factory=list)
    rest: list[Rest] = field(default_factory=list)
    save: list[Save] = field(default_factory=list)

    def sections(self) -> Iterator[tuple[str, str]]:
        """Title and Markdown of each part that was measured."""
        if self.growth:
            yield "Growing turn by turn", growth_table(self.growth)
        if self.load:
            yield "Loading", "\n\n".join([load_table(self.load), steps_table(self.load), *join_lines(self.load)])
        if self.rest:
            yield "At rest", rest_table(self.rest)
        if self.save:
            yield "Saving while another agent decodes", save_table(self.save)

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": 1, **asdict(self)}


async def measure(parts: list[Part], extent: Extent, where: Path, say: Callable[[str], None]) -> StoreReport:
    """Measure the parts, one after another, each in a temporary folder inside `where`."""
    report = StoreReport(_environment(), extent)
    longest = max(extent.contexts)
    if Part.GROWTH in parts:
        for name in (BUILTIN, LARGE):
            say(f"growing {name} to {longest:,} tokens")
            with _folder(where) as folder:
                shape = shape_of(name)
                report.growth.append(await grow(shape, folder, tokens=longest, turn=TURN, commits=extent.commits))
    if Part.LOAD in parts:
        for tokens in extent.contexts:
            say(f"loading {tokens:,} tokens of {LARGE}")
            with _folder(where) as folder:
                report.load += await measure_load(
                    shape_of(LARGE), folder, tokens=tokens, repeats=extent.repeats, joins=extent.joins
                )
    if Part.REST in parts:
        for name in AT_REST:
            for group_size in GROUP_SIZES:
                say(f"{name} at rest, groups of {group_size}")
                with _folder(where) as folder:
                    shape = shape_of(name, group_size)
                    report.rest.append(await rest(shape, folder, tokens=extent.rest_tokens, turn=TURN))
    if Part.SAVE in parts:
        for name in (BUILTIN, LARGE):
            say(f"saving {longest:,} tokens of {name} while {BUILTIN} decodes")
            rounds = extent.rounds if name == BUILTIN else -(-extent.rounds // 10)
            with _folder(where) as folder:
                report.save.append(await measure_save(BUILTIN, shape_of(name), folder, tokens=longest, rounds=rounds))
    return report


def write(report: StoreReport, folder: Path) -> None:
    """Write store.json, and store.md with the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store.json").write_text(json.dumps(report.to_json()) + "\n")
    text = [
        f"# The store, {report.environment['time']}",
        *(f"## {title}\n\n{body}" for title, body in report.sections()),
    ]
    (folder / "store.md").write_text("\n\n".join(text) + "\n")


@contextmanager
def _folder(where: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="warmkv-store-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "versions": {name: version_of(name) for name in ("warmkv", "mlx", "mlx-lm", "numpy")},
        "python": platform.python_version(),
    }
