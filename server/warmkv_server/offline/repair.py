"""Putting bad files away, as a server does when it meets one: into quarantine, and noted in the index."""

from __future__ import annotations

from collections.abc import Iterable

from warmkv_server.contract.kv import Fallback
from warmkv_server.errors import OperatorError
from warmkv_server.kv.blocks.disk import QUARANTINE, quarantine
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.index.index import Node
from warmkv_server.kv.index.records import Tuning
from warmkv_server.offline.directory import Taken
from warmkv_server.offline.findings import Bad, Trouble


def put_away(taken: Taken, bad: Iterable[Bad]) -> int:
    """Returns how many files were moved. What nobody can read or the index doesn't know stays where it is.

    Raises:
        OperatorError: the disk refuses.
    """
    changed: dict[Node, None] = {}
    moved = 0
    try:
        for each in bad:
            if each.trouble in (Trouble.UNKNOWN, Trouble.UNREADABLE):
                continue
            if each.trouble is not Trouble.MISSING:
                limit = Tuning.quarantine_bytes
                quarantine(taken.files, each.path, taken.data_dir / QUARANTINE, limit)
                moved += 1
            if each.node is not None and each.kind is not None:
                del each.node.parts[each.kind]
                missing = each.trouble is Trouble.MISSING
                each.node.lost = Fallback.MISSING_BLOCK if missing else Fallback.QUARANTINED
                changed[each.node] = None
        taken.database.apply([rows.update_node(node) for node in changed])
    except OSError as error:
        raise OperatorError(f"the disk refuses to put bad files away ({error.strerror or error})") from error
    return moved
