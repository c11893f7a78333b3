"""The operator's limit on open files, and who gets how many of them.

Everything that a client can open is a connection; the store and the metrics must still open files when strangers hold
all the connections that there can be.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from warmkv_server.errors import OperatorError

_LEAST = 256
_RESERVE = 192
"""The index, the model, pipes and listening sockets take some 20; the rest is for block files that are read or written
at once, and for the metrics' visitors."""
_ESTABLISHED = "01"


@contextmanager
def limits_unchanged() -> Iterator[None]:
    """Leave the limits as they are, whatever the block imports.

    mlx-lm sets the limit on open files when it is imported: lower than most operators', for good, and with an error
    where they allow less.
    """
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit


def for_connections() -> int:
    """Connections that there can be at once.

    Raises:
        OperatorError: if the limit leaves no room for any.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return (1 << 31) - 1
    if limit < _LEAST:
        raise OperatorError(
            f"a process may have {limit} open files here, and the server needs {_LEAST}: raise the limit (ulimit -n)"
        )
    return limit - _RESERVE


def open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir()) - 1  # without the one that lists them


def open_connections(port: int) -> int | None:
    """Connections to a port of this machine, as far as the system tells."""
    tables = [Path(f"/proc/self/net/{name}") for name in ("tcp", "tcp6")]
    if not tables[0].exists():
        return None
    ending, found = f":{port:04X}", 0
    for table in tables:
        if table.exists():
            for line in table.read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                found += state == _ESTABLISHED and local.endswith(ending)
    return found
