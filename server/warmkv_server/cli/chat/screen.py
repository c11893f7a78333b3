"""Where a chat's words go: answers to stdout, everything else to stderr, dim."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.text import Text

from warmkv_server.cli.bar import Bar
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
        with Bar() as bar:
            on_screen = AnswerOnScreen(bar, shown)
            try:
                yield on_screen
            finally:
                on_screen.end()


class AnswerOnScreen:
    """One answer, piece by piece, behind the progress of a long prefill."""

    def __init__(self, bar: Bar, shown: str) -> None:
        self._bar = bar
        self._again = shown
        """What the screen has of the answer and this stream hasn't said again yet."""
        self._line = False

    def follow(self, event: v1.GenerateResponse) -> None:
        if event.HasField("prefill_progress"):
            self._bar.tell(event.prefill_progress.tokens_done, event.prefill_progress.tokens_total)
        elif event.delta.text:
            self._bar.hide()
            self._write(event.delta.text)

    def end(self) -> None:
        """End the line, if there is one."""
        self._bar.hide()
        if self._line:
            print(flush=True)

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
