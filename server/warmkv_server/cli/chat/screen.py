"""Where a chat's words go: answers to stdout, everything else to stderr, dim."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from warmkv_server.offline.words import console, printable

if TYPE_CHECKING:
    from warmkv import v1


class Screen:
    """The terminal, or the pipes."""

    def __init__(self) -> None:
        self._aside = console(stderr=True)

    def note(self, words: str) -> None:
        self._aside.print(Text(words, style="dim"), soft_wrap=True)

    def problem(self, words: str) -> None:
        self._aside.print(Text(f"warmkv: {words}", style="red"), soft_wrap=True)

    def show(self, words: str) -> None:
        """What a command was asked for."""
        print(printable(words), flush=True)

    @contextmanager
    def answer(self, shown: str) -> Iterator[AnswerOnScreen]:
        """Show an answer; the line is ended behind it.

        Args:
            shown: of the same answer, before the connection broke.
        """
        bar = Progress(
            TextColumn("[dim]computing the context"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._aside,
            transient=True,
        )
        on_screen = AnswerOnScreen(bar, self._aside.is_terminal, shown)
        try:
            yield on_screen
        finally:
            on_screen.end()


class AnswerOnScreen:
    """One answer, piece by piece, behind the progress of a long prefill."""

    def __init__(self, bar: Progress, with_bar: bool, shown: str) -> None:
        self._bar = bar
        self._with_bar = with_bar
        self._task: TaskID | None = None
        self._again = shown
        """What the screen has of the answer and this stream hasn't said again yet."""
        self._line = False

    def follow(self, event: v1.GenerateResponse) -> None:
        if event.HasField("prefill_progress") and self._with_bar:
            self._progress(event.prefill_progress)
        elif event.delta.text:
            self._hide_bar()
            self._write(event.delta.text)

    def end(self) -> None:
        """End the line, if there is one."""
        self._hide_bar()
        if self._line:
            print(flush=True)

    def _hide_bar(self) -> None:
        if self._task is not None:
            self._bar.stop()
            self._task = None

    def _progress(self, now: v1.PrefillProgress) -> None:
        if self._task is None:
            self._task = self._bar.add_task("", total=now.tokens_total)
            self._bar.start()
        self._bar.update(self._task, completed=now.tokens_done)

    def _write(self, text: str) -> None:
        if self._again:
            said = min(len(text), len(self._again))
            if self._again.startswith(text[:said]):
                self._again, text = self._again[said:], text[said:]
            else:  # sampled anew, and it went another way
                self._again = ""
        if text:
            sys.stdout.write(printable(text))
            sys.stdout.flush()
            self._line = True
