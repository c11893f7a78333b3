"""Whether the disk takes what is committed, for whoever has to know."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class DiskState:
    """Used on the event loop's thread. At first the disk takes everything.

    Args:
        tell: called now, and with every change: True while every agent's last commit is on disk.
    """

    def __init__(self, tell: Callable[[bool], object]) -> None:
        self._refusing = False
        self._tell = tell
        tell(True)

    def note(self, not_durable: int) -> None:
        """
        Args:
            not_durable: agents whose last commit is in RAM only, because the disk refused it.
        """
        if bool(not_durable) == self._refusing:
            return
        self._refusing = bool(not_durable)
        if self._refusing:
            log.error("the disk refuses commits: they stay in RAM and are written when it takes them again")
        else:
            log.info("the disk takes commits again, and all of them are on it")
        self._tell(not self._refusing)
