"""How people see sizes, times and tables; imports nothing heavy."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from warmkv_server.contract import durations
from warmkv_server.errors import OperatorError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(nbytes: float) -> str:
    """Bytes with a unit, such as 1.5 GiB."""
    for unit in _UNITS[:-1]:
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1024
    return f"{nbytes:.1f} {_UNITS[-1]}"


def seconds(duration: str) -> float:
    """
    Args:
        duration: a number and a unit, such as 30d.

    Raises:
        OperatorError: it is not.
    """
    try:
        return durations.seconds(duration)
    except ValueError as error:
        raise OperatorError(str(error)) from None


def ago(seconds: float) -> str:
    seconds = max(seconds, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def span(seconds: float) -> str:
    """A time, in its two largest units."""
    left, words = int(max(seconds, 0)), list[str]()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, length)
        if number or (unit == "s" and not words):
            words.append(f"{number} {unit}")
    return " ".join(words[:2])


def printable(text: str) -> str:
    """Text without the characters that a terminal takes for orders."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal, and wide enough for any row where there is none."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=200)


def table(texts: tuple[str, ...], numbers: tuple[str, ...] = ()) -> Table:
    """Columns of text, then columns of numbers."""
    made = Table(box=None, header_style="bold")
    for name in texts:
        made.add_column(name, overflow="fold")
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made
