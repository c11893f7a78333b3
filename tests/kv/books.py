"""The store's books against what they are of: sums that are made anew, and the directory itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from warmkv_server.contract.store import Tier
from warmkv_server.kv.catalog import rows
from warmkv_server.kv.store import Store


def check_sums(store: Store) -> None:
    """What is kept as it changes is what summing gives. Nothing is in flight."""
    core = store.core
    index, accounts, hot = core.index, core.accounts, core.hot
    agents, nodes = list(index.agents.values()), list(index.nodes.values())
    for node in nodes:
        assert node.agents == {agent for agent in agents if node in set(agent.all_nodes())}
        assert +node.part_refs == Counter(kind for agent in agents for other, kind in agent.partial if other is node)
        assert node.pinned_refs == sum(agent.pinned for agent in node.agents)
        assert node.named_refs == sum(not agent.hidden for agent in node.agents)
        assert node.hot_bytes >= 0
    for agent in agents:
        sizes = accounts.measure(agent)
        assert (agent.hot_bytes, agent.warm_bytes) == (sizes.hot_bytes, sizes.warm_bytes)
        assert (agent.shared_bytes, agent.cold_parts) == (sizes.shared_bytes, sizes.cold_parts)
    assert accounts.hot_agents == sum(not agent.cold_parts for agent in agents if not agent.hidden)
    assert accounts.block_bytes == sum(node.disk_bytes for node in nodes)
    by_tenant: Counter[str] = Counter()
    for node in nodes:
        by_tenant[node.tenant] += node.disk_bytes
    assert accounts.disk == +by_tenant
    assert hot.nbytes == sum(node.hot_bytes for node in nodes)
    assert 0 <= hot.unsaved_bytes <= hot.nbytes <= max(hot.limit, hot.unsaved_bytes)
    stats = store.stats()
    only_hidden = [node for node in nodes if node.agents and all(agent.hidden for agent in node.agents)]
    in_index = sum(1024 + 4 * len(agent.tokens) for agent in agents if agent.hidden)
    assert stats.hidden_bytes == sum(node.disk_bytes for node in only_hidden) + in_index
    assert hot.hidden_bytes == sum(node.hot_bytes for node in only_hidden)
    assert stats.hidden_agents == sum(agent.hidden for agent in agents)
    assert stats.agents_by_tier.get(Tier.HOT.value, 0) == accounts.hot_agents


def check_directory(store: Store, data_dir: Path) -> None:
    """The books have every file that is there, with its size, and no others."""
    core = store.core
    spared = rows.read_spared(core.journal.database)  # by a rebuild of the index, for the operator to see
    files = {name: nbytes for name, nbytes in core.tier.list() if name not in spared}
    known = {
        n.object_name(kind, part): part.nbytes for n in core.index.nodes.values() for kind, part in n.parts.items()
    }
    assert files == {**core.accounts.going, **known}
    assert not core.accounts.going.keys() & known.keys()
    assert core.accounts.going_bytes == sum(core.accounts.going.values())
    assert core.quarantine_bytes == sum(path.stat().st_size for path in (data_dir / "quarantine").iterdir())
    manifests = sum(path.stat().st_size for path in (data_dir / "agents").glob("*.json"))
    owed = core.manifest_bytes - sum(core.manifest_sizes.values())
    assert sum(core.manifest_sizes.values()) == manifests
    assert owed >= 0
    assert store.stats().disk_bytes >= sum(path.stat().st_size for path in data_dir.rglob("*") if path.is_file())
