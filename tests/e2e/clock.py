"""A server's clock that a test moves."""

from __future__ import annotations

from pathlib import Path

_PYTHON = """
import os, time
real = time.time
def shifted():
    with open(os.environ["SHIFT"]) as file:
        return real() + float(file.read())
time.time = shifted
"""


class Shift:
    """
    Attributes:
        environment: what a server has to be started with.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._later = folder / "shift", folder / "later"
        self._file.write_text("0")
        python = folder / "python"
        python.mkdir()
        (python / "sitecustomize.py").write_text(_PYTHON)
        self.environment = {"PYTHONPATH": str(python), "SHIFT": str(self._file)}

    def days(self, number: int) -> None:
        """So many from now."""
        self._later.write_text(str(86400 * number))
        self._later.replace(self._file)  # at once: the server reads it all the time
