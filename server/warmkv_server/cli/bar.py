"""A bar for what takes long, on stderr where that is a terminal, and nothing elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from warmkv_server.cli import reports
from warmkv_server.offline.words import console

if TYPE_CHECKING:
    from warmkv import v1

_COMPUTING = "computing the context"


class Bar:
    """Appears when there is something to tell, and leaves nothing behind: `with Bar() as bar`.

    Args:
        numbers: how it shows them, if not as they are.
        aside: where it is shown, if not on stderr.

    Attributes:
        is_shown: whether there is a terminal.
    """

    def __init__(self, numbers: ProgressColumn | None = None, aside: Console | None = None) -> None:
        aside = aside or console(stderr=True)
        self.is_shown = aside.is_terminal
        self._bar = Progress(
            TextColumn("[dim]{task.description}"),
            BarColumn(),
            numbers or MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=aside,
            transient=True,
        )
        self._task: TaskID | None = None
        self._doing = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hide()

    def tell(self, done: int, total: int, doing: str = _COMPUTING) -> None:
        """Show how far it is; without a total, only that it goes on."""
        if not self.is_shown:
            return
        if doing != self._doing:
            self.hide()
        if self._task is None:
            self._task, self._doing = self._bar.add_task(doing, total=None), doing
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total or None)

    def follow(self, progress: v1.PrimeProgress) -> None:
        """Show how far a Prime or an Extend is."""
        from warmkv import v1

        computes = progress.activity == v1.ACTIVITY_PREFILLING
        doing = _COMPUTING if computes else reports.activity(progress.activity)
        self.tell(progress.tokens_done, progress.tokens_total, doing)

    def hide(self) -> None:
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task, self._doing = None, ""
