"""A bar for what takes long, on stderr where that is a terminal, and nothing elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from warmkv_server.cli import reports
from warmkv_server.offline.words import console

if TYPE_CHECKING:
    from warmkv import v1

COMPUTING = "computing the context"


class Bar:
    """Appears when there is something to tell, and leaves nothing behind: `with Bar() as bar`."""

    def __init__(self) -> None:
        aside = console(stderr=True)
        self._shown = aside.is_terminal
        self._bar = Progress(
            TextColumn("[dim]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=aside,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hide()

    def tell(self, done: int, total: int, doing: str = COMPUTING) -> None:
        """Show how far it is; without a total, only what is done."""
        if not self._shown:
            return
        if self._task is None:
            self._task = self._bar.add_task(doing)
            self._bar.start()
        self._bar.update(self._task, description=doing, completed=done, total=total or None)

    def follow(self, progress: v1.PrimeProgress) -> None:
        """Show how far a Prime or an Extend is."""
        from warmkv import v1

        computes = progress.activity == v1.ACTIVITY_PREFILLING
        self.tell(
            progress.tokens_done, progress.tokens_total, COMPUTING if computes else reports.activity(progress.activity)
        )

    def hide(self) -> None:
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None
