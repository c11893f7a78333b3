"""Runs the plan: calibrates, predicts, measures round by round, and keeps what it has after each of them."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from warmkv_bench.config import MatrixConfig
from warmkv_bench.plan import Round, calibration, plan
from warmkv_bench.predict import ContextTime, Predictions, TimeModel
from warmkv_bench.results import Results
from warmkv_bench.rounds import Outcome, RoundRunner
from warmkv_bench.spawn import ServerFailed


class Progress(Protocol):
    """Shows how far a run is, in predicted seconds."""

    def planned(self, total_s: float) -> None: ...

    def begins(self, round_: Round, remaining_s: float) -> None: ...

    def ended(self, predicted_s: float, actual_s: float, outcome: Outcome) -> None: ...


class Matrix:
    """One run of a matrix. `results` is valid after every round, however the run ends; its summary is the report's."""

    def __init__(
        self, config: MatrixConfig, results: Results, runner: RoundRunner, folder: Path, progress: Progress
    ) -> None:
        self.results = results
        self._config = config
        self._runner = runner
        self._folder = folder
        self._progress = progress
        self._model = TimeModel()
        self._plan = plan(config)
        self._stride = max((*config.batch_sizes, 2))

    async def calibrate(self) -> list[tuple[Round, float]]:
        """Runs the unmeasured rounds, and returns the rounds that are to be run with their predicted seconds.

        A fault of the server here is a problem of the run, not its end: it will show in the samples, one by one.
        """
        begin = time.perf_counter()
        for index, round_ in enumerate(calibration(self._config)):
            outcome = await self._runner.run(round_, (len(self._plan) + index) * self._stride)
            faults = [sample.invalid_reason or "" for sample in outcome.samples if not sample.verified]
            if outcome.problems or faults:
                what = "; ".join(dict.fromkeys(outcome.problems + faults))
                self.results.problems.append(f"calibration at {round_.context_tokens} tokens: {what}")
            self._observe(round_, outcome)
        self._calibration_s = time.perf_counter() - begin
        todo = [round_ for round_ in self._plan if round_.key not in self.results.rounds]
        return [(round_, self._predict(round_)) for round_ in todo]

    async def run(self, todo: list[tuple[Round, float]]) -> None:
        """Runs the rounds until they are done or `max_time_s` would be passed."""
        if not todo:
            self.results.status = "complete"
            return
        self._progress.planned(sum(seconds for _, seconds in todo))
        times = _context_times(todo)
        predictions = Predictions(sum(seconds for _, seconds in todo), self._calibration_s, list(times.values()))
        begin = time.perf_counter()
        status = "complete"
        try:
            previous: Round | None = None
            for index, (round_, _) in enumerate(todo):
                remaining = sum(self._predict(later) for later, _ in todo[index:])
                if previous is None or previous.context_tokens != round_.context_tokens:
                    self._note_refit(predictions, times[round_.context_tokens], previous, todo)
                previous = round_
                predicted = self._predict(round_)
                if self._out_of_time(time.perf_counter() - begin + predicted):
                    status = "out of time"
                    break
                self._progress.begins(round_, remaining)
                await self._run_round(round_, predicted, times[round_.context_tokens])
            predictions.actual_total_s = time.perf_counter() - begin if status == "complete" else None
        except ServerFailed as failure:
            status = f"failed: {failure}"
            raise
        except BaseException:
            status = "interrupted"
            raise
        finally:
            self.results.status = status
            self.results.predictions = predictions.to_json()
            self.results.write(self._folder)

    async def _run_round(self, round_: Round, predicted_s: float, spent: ContextTime) -> None:
        begin = time.perf_counter()
        outcome = await self._runner.run(round_, self._plan.index(round_) * self._stride)
        actual_s = time.perf_counter() - begin
        spent.actual_s = (spent.actual_s or 0.0) + actual_s
        self._observe(round_, outcome)
        self.results.samples += outcome.samples
        self.results.memory += [asdict(row) for row in outcome.memory]
        self.results.problems += outcome.problems
        if not outcome.problems and all(sample.verified for sample in outcome.samples):
            self.results.rounds.append(round_.key)
        self.results.write(self._folder)
        self._progress.ended(predicted_s, actual_s, outcome)

    def _observe(self, round_: Round, outcome: Outcome) -> None:
        if outcome.problems or not all(sample.verified for sample in outcome.samples):
            return  # a failed step's time says nothing about the next one
        tokens = self._runner.prefix_tokens(round_)
        for step, seconds in outcome.steps:
            self._model.observe(step, round_.batch_size, tokens, seconds)

    def _predict(self, round_: Round) -> float:
        return self._model.predict(round_, self._runner.prefix_tokens(round_))

    def _out_of_time(self, then_s: float) -> bool:
        return self._config.max_time_s is not None and then_s > self._config.max_time_s

    def _note_refit(
        self,
        predictions: Predictions,
        context: ContextTime,
        previous: Round | None,
        todo: list[tuple[Round, float]],
    ) -> None:
        same = [round_ for round_, _ in todo if round_.context_tokens == context.context_tokens]
        context.refitted_s = sum(self._predict(round_) for round_ in same)
        curve = self._model.prefill
        if curve is not None:
            predictions.note_curve(previous.context_tokens if previous else 0, curve)


def _context_times(todo: list[tuple[Round, float]]) -> dict[int, ContextTime]:
    times: dict[int, ContextTime] = {}
    for round_, seconds in todo:
        context = times.setdefault(round_.context_tokens, ContextTime(round_.context_tokens, 0.0))
        context.at_start_s += seconds
    return times
