"""Text to evaluate on, cut into windows of exact token counts."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from warmkv_server.contract.content import RawText
from warmkv_server.errors import OperatorError
from warmkv_server.text.text import Text

_PROGRAMS = ("argparse", "ast", "configparser", "datetime", "decimal", "difflib", "doctest", "inspect", "tarfile")
_TURN = 12_000
"""Characters."""


def read_text(path: Path | None) -> str:
    """The text of a file; by default the language reference and programs that every Python carries, in turns.

    Raises:
        OperatorError: if the file can't be read.
    """
    if path is None:
        from pydoc_data.topics import topics

        prose = "\n\n".join(topics[name] for name in sorted(topics))
        folder = Path(sysconfig.get_path("stdlib"))
        programs = "\n\n".join((folder / f"{name}.py").read_text() for name in _PROGRAMS)
        return "\n\n".join(
            prose[at : at + _TURN] + "\n\n" + programs[at : at + _TURN] for at in range(0, len(programs), _TURN)
        )
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"--text {path} can't be read as UTF-8 text: {error}") from error


def cut(text: Text, content: str, length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` tokens, evenly spread over the content, each starting a context.

    They overlap where the content is short; the spread keeps them as different as it allows.

    Raises:
        OperatorError: if the content has fewer tokens than one window.
    """
    tokens = text.encode(RawText(content), starts=True, ending="raw", held=0, tail=(), answer=False).tokens.tolist()
    if len(tokens) < length:
        raise OperatorError(
            f"the text has {len(tokens)} tokens, fewer than a window of {length}; give a longer --text or a smaller "
            "--contexts"
        )
    last = len(tokens) - length
    starts = [round(last * number / max(1, count - 1)) for number in range(count)]
    return [tokens[start : start + length] for start in starts]
