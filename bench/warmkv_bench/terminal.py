"""What a person sees while the benchmark runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable

from warmkv_bench.plan import Round
from warmkv_bench.rounds import Outcome
from warmkv_bench.tables import Table

LOG_WIDTH = 160


class Terminal:
    """Prints plan, progress and results; a line for each round, so that a log file reads as well as a screen."""

    def __init__(self) -> None:
        # Brackets hold intervals here, not markup.
        console = Console(markup=False, highlight=False)
        # A log file has no width; the default of 80 columns would break every table.
        self.console = console if console.is_terminal else Console(markup=False, highlight=False, width=LOG_WIDTH)
        self._total_s = 0.0
        self._done_s = 0.0

    def say(self, text: str) -> None:
        self.console.print(text)

    def planned(self, total_s: float) -> None:
        self._total_s = total_s

    def begins(self, round_: Round, remaining_s: float) -> None:
        share = self._done_s / self._total_s if self._total_s else 0.0
        self.say(f"[{share:4.0%}, {duration(remaining_s)} to go] {describe(round_)}")

    def ended(self, predicted_s: float, actual_s: float, outcome: Outcome) -> None:
        self._done_s += predicted_s
        shown = ", ".join(
            f"{sample.state} {latency:.1f} ms" if sample.verified and latency is not None else f"{sample.state} INVALID"
            for sample in outcome.samples
            for latency in [sample.ttft_ms if sample.ttft_ms is not None else sample.e2e_ms]
        )
        self.say(f"    {shown}; {actual_s:.1f} s (predicted {predicted_s:.1f} s)")
        reasons = dict.fromkeys(sample.invalid_reason for sample in outcome.samples if not sample.verified)
        for reason in [*filter(None, reasons), *outcome.problems]:
            self.say(f"    ! {reason}")

    def table(self, table: Table) -> None:
        shown = RichTable(title=table.title, title_justify="left", show_header=any(table.columns))
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if index < table.labels else "right")
        for row in table.rows:
            shown.add_row(*row)
        self.console.print(shown)


def plan_table(todo: Sequence[tuple[Round, float]]) -> Table:
    """The plan by context: how many rounds and samples, and the predicted time."""
    by_context: dict[tuple[int, str, str, int], list[tuple[Round, float]]] = defaultdict(list)
    for round_, seconds in todo:
        by_context[round_.context_tokens, round_.purpose, round_.mode, round_.batch_size].append((round_, seconds))
    rows = []
    for (context, purpose, mode, batch), rounds in by_context.items():
        samples = sum(len(round_.states) * round_.batch_size for round_, _ in rounds)
        isolations = " and ".join(dict.fromkeys(round_.isolation for round_, _ in rounds))
        states = ", ".join(sorted({state for round_, _ in rounds for state in round_.states}))
        predicted = duration(sum(seconds for _, seconds in rounds))
        rows.append((f"{context:,}", purpose, mode, states, isolations, str(batch), str(samples), predicted))
    total = duration(sum(seconds for _, seconds in todo))
    rows.append(("all", "", "", "", "", "", str(sum(len(r.states) * r.batch_size for r, _ in todo)), total))
    columns = ("Context", "Purpose", "Mode", "States", "Isolation", "Batch", "Samples", "predicted")
    return Table("Plan", columns, rows, labels=5)


def describe(round_: Round) -> str:
    batch = f", batch of {round_.batch_size}" if round_.batch_size > 1 else ""
    where = f"{round_.purpose} {round_.context_tokens:,} tokens, {round_.mode}"
    return f"{where}, run {round_.run}{batch}, {round_.isolation}"


def duration(seconds: float) -> str:
    """A time that a person reads at a glance."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
