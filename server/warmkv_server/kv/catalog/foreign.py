"""Contexts whose KV belongs to another model, tokenizer or KV setting: how they differ, and what that costs.

They keep their tokens and their files. The first request that goes on from one computes it anew, all of it, unless
another agent has the same context by then.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from warmkv_server.kv.index.index import Agent, Index
from warmkv_server.kv.index.records import Fingerprint

log = logging.getLogger(__name__)

_SHORT = 12
_OWN_CHOICE = {"kv", "kv_bits", "kv_group_size", "kv_streams"}
"""Fields that follow from flags; the others follow from the model."""


class Foreign:
    """How the fingerprints of a data directory differ from the one that is served.

    Args:
        known: fingerprints by digest; a rebuilt index has lost what others were made of.
    """

    def __init__(self, served: Fingerprint, known: Mapping[str, Fingerprint]) -> None:
        self._served = served
        self._known = known

    def differences(self, digest: str) -> tuple[str, ...]:
        """Each field that differs, such as "kv_bits: 4 -> 8"; nothing if it is unknown what it was made of."""
        kept = self._known.get(digest)
        if kept is None:
            return ()
        return tuple(
            f"{name}: {_brief(kept.fields.get(name, ''))} -> {_brief(self._served.fields.get(name, ''))}"
            for name in kept.differing(self._served)
        )

    def say(self, index: Index, data_dir: Path) -> None:
        """One line in the log for each model or setting that agents belong to and that isn't served."""
        agents: defaultdict[str, list[Agent]] = defaultdict(list)
        for agent in index.agents.values():
            if agent.fingerprint != self._served.digest:
                agents[agent.fingerprint].append(agent)
        for digest, those in sorted(agents.items()):
            nodes = {node for agent in those for node in agent.all_nodes()}
            log.warning(
                "%d agents with %d tokens and %d bytes can't use their KV, which is of another fingerprint (%s): the "
                "next request of each computes its context anew; %s, or remove them with `warmkv store gc --data-dir %s"
                " --fingerprint %s` while no server runs",
                len(those),
                sum(len(agent.tokens) for agent in those),
                sum(node.disk_bytes for node in nodes),
                ", ".join(self.differences(digest)) or "nobody knows any more how it differs",
                self._remedy(digest),
                data_dir,
                digest[:_SHORT],
            )

    def _remedy(self, digest: str) -> str:
        kept = self._known.get(digest)
        differing = set(kept.differing(self._served)) if kept is not None else set()
        if kept is None or not differing <= _OWN_CHOICE:
            return "to go on with it, serve the model that it was made with"
        chosen = kept.fields.get("kv")
        if "kv_streams" in kept.fields and chosen is None:
            return "to go on with it, serve it as it was served then"  # a codec that was changed for the model's sake
        if chosen is None and kept.fields["kv_bits"] == "0":
            flags = ["--kv-bits 0"]
        else:
            first = f"--kv {chosen}" if chosen is not None else f"--kv-bits {kept.fields['kv_bits']}"
            flags = [first, f"--kv-group-size {kept.fields['kv_group_size']}"]
        return f"to go on with it, serve with {' '.join(flags)}"


def _brief(value: str) -> str:
    return value[:_SHORT] or "none"
