"""What a request without an agent leaves behind: its context, as a hidden agent, for whoever sends it again and more.

Nobody can ask for it by name, and nothing is promised: where it can't be kept, the answer is the same.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from warmkv_server.agents.compute import Computation
from warmkv_server.contract.conversation import Ending
from warmkv_server.contract.generation import Finished
from warmkv_server.contract.names import AgentKey, hidden_id
from warmkv_server.errors import MemoryBudget, StorageUnavailable

log = logging.getLogger(__name__)


async def keep_anonymous(work: Computation, completion: tuple[int, ...], finished: Finished | None) -> None:
    """Keep the context of a request without an agent, where the operator wants it.

    Args:
        completion: tokens of the answer, behind the prompt.
        finished: what the engine computed; None if everything was there.
    """
    ttl = work.tools.keep_anonymous
    if ttl is None:
        return
    hidden = AgentKey(work.key.tenant, hidden_id())
    try:
        await replace(work, key=hidden).commit(completion, finished, None, {"ttl": ttl}, str(Ending.RAW))
    except (MemoryBudget, StorageUnavailable) as error:
        log.debug("the context of a request without an agent isn't kept: %s", error)
