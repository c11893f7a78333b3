"""The results of a run as they are kept: raw samples first, everything else derived from them."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from warmkv_bench.config import MatrixConfig

SCHEMA_VERSION = 1
FILE_NAME = "results.json"


class ResultsError(Exception):
    """A results file that cannot be used: one sentence that says which and why."""


@dataclass(slots=True)
class Sample:
    """One measured request. Times are milliseconds; a value that was not or cannot be measured is None, never 0.

    Attributes:
        context_tokens: nominal size; `prefix_tokens` is the exact length of the prefix.
        state, mode, isolation, purpose: values of State, Mode, Isolation and Purpose.
        round_key: names the round; samples of one round are pairs for a ratio.
        run: repetition, from 1; `repeat` counts the samples of one state within it, from 1.
        batch_index: counts the requests that were released together, from 0.
        page_cache: "dropped" or "not controlled" for warm-dropped, else empty.
        ttft_ms: first delta; None for a final answer, which has only one.
        itl_ms: median gap between tokens; `tpot_ms`: mean gap.
        e2e_ms: `finished`, which is after the commit. `last_token_ms`: the last delta.
        tokens_per_s: output tokens of the request by its e2e time.
        batch_tokens_per_s: output tokens of all requests released together, by the time until the last of them ended.
        token_times_ms: when each token arrived; `output_ids`: the tokens.
        kv_bytes_written, metadata_bytes_written: by the whole batch, from the server's counters.
        server: the server's own stages in milliseconds (queue, load, prefill, first_token, decode, commit).
        setup_ms: what making the state took.
        verified: every proof held; else `invalid_reason` says what did not.
    """

    context_tokens: int
    prefix_tokens: int
    suffix_tokens: int
    state: str
    mode: str
    batch_size: int
    batch_index: int
    run: int
    isolation: str
    purpose: str
    round_key: str
    repeat: int = 1
    page_cache: str = ""
    ttft_ms: float | None = None
    itl_ms: float | None = None
    tpot_ms: float | None = None
    last_token_ms: float | None = None
    e2e_ms: float | None = None
    tokens_per_s: float | None = None
    batch_tokens_per_s: float | None = None
    output_tokens: int | None = None
    output_ids: list[int] = field(default_factory=list)
    token_times_ms: list[float] = field(default_factory=list)
    source: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    hot_tokens: int | None = None
    warm_tokens: int | None = None
    shared_tokens: int | None = None
    prefilled_tokens: int | None = None
    bytes_loaded: int | None = None
    resident_bytes: int | None = None
    kv_bytes_written: int | None = None
    metadata_bytes_written: int | None = None
    agent_hot_bytes: int | None = None
    agent_warm_bytes: int | None = None
    server: dict[str, float] = field(default_factory=dict)
    setup_ms: float | None = None
    verified: bool = False
    invalid_reason: str | None = None


@dataclass(slots=True)
class Results:
    """A whole run. `summary` is derived from `samples`; `status` tells how the run ended.

    Attributes:
        rounds: keys of the rounds that were completed, for --resume.
        predictions: see predict.Predictions.to_json.
        memory: rows of memory.MemoryRow.
        problems: what went wrong outside of any sample; they fail the run, too.
        status: "complete", "interrupted", "out of time", or "failed: why".
    """

    environment: dict[str, Any]
    config: MatrixConfig
    run_id: str
    samples: list[Sample] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, Any] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    status: str = "interrupted"

    @property
    def invalid(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.verified]

    @property
    def good(self) -> bool:
        """Whether everything that was measured can be trusted; a run that was cut short can be good."""
        return not self.invalid and not self.problems and not self.status.startswith("failed")

    def forget_unfinished(self) -> None:
        """Drops the samples of rounds that were not completed, so that they can be run again."""
        self.samples = [sample for sample in self.samples if sample.round_key in self.rounds]
        self.problems = []

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "status": self.status,
            "environment": self.environment,
            "config": self.config.to_json(),
            "summary": self.summary,
            "predictions": self.predictions,
            "memory": self.memory,
            "rounds": self.rounds,
            "problems": self.problems,
            "samples": [asdict(sample) for sample in self.samples],
        }

    def write(self, folder: Path) -> None:
        """Writes results.json and samples.csv; a reader sees the old or the new file, never half of one."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / FILE_NAME, _text(self.to_json()))
        temporary = folder / "samples.csv.tmp"
        with temporary.open("w", newline="") as file:
            skipped = ("output_ids", "token_times_ms", "server")
            columns = [column.name for column in fields(Sample) if column.name not in skipped]
            stages = sorted({stage for sample in self.samples for stage in sample.server})
            writer = csv.writer(file)
            writer.writerow([*columns, *(f"server_{stage}_ms" for stage in stages)])
            for sample in self.samples:
                values = [getattr(sample, column) for column in columns]
                writer.writerow([*values, *(sample.server.get(stage) for stage in stages)])
        temporary.replace(folder / "samples.csv")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads a results.json, or the one in a folder.

        Raises:
            ResultsError: there is none, or it is not one of this schema.
        """
        file = path / FILE_NAME if path.is_dir() else path
        try:
            data = json.loads(file.read_text())
            if data["schema_version"] != SCHEMA_VERSION:
                raise ResultsError(
                    f"{file} has schema version {data['schema_version']}, this benchmark reads {SCHEMA_VERSION}"
                )
            return cls(
                environment=data["environment"],
                config=MatrixConfig.from_json(data["config"]),
                run_id=data["run_id"],
                samples=[Sample(**sample) for sample in data["samples"]],
                summary=data["summary"],
                predictions=data["predictions"],
                memory=data["memory"],
                rounds=data["rounds"],
                problems=data["problems"],
                status=data["status"],
            )
        except FileNotFoundError:
            raise ResultsError(f"{file} does not exist") from None
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"{file} is not the results of a run: {error!r}") from None


def _text(data: dict[str, Any]) -> str:
    """JSON with a line for each sample, which diffs and greps well."""
    samples = ",\n  ".join(json.dumps(sample) for sample in data["samples"])
    head = json.dumps({**data, "samples": None}, indent=1)
    return head.replace('"samples": null', f'"samples": [\n  {samples}\n ]') + "\n"


def replace_file(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
