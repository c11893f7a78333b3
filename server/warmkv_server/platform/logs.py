"""How the server's log is written: lines for people, or JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

FIELDS = "fields"
"""Attribute of a record: what its line says, by name."""

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NOISY = ("httpx", "huggingface_hub", "filelock")


class JsonLines(logging.Formatter):
    """An object for each record; what a request's line says has names of its own in it."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, FIELDS, None)
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage() if fields is None else "request",
            **(fields or {}),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the time: lines go above a bar that is shown there.

    A line that can't be written, such as to a file on a full disk, is lost: there is nowhere to say so.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is not sys.stderr:
            self.setStream(sys.stderr)
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def log_to_stderr(level: str, form: str) -> None:
    """Have everything from this level on written so."""
    handler = _Stderr(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
