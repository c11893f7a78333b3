"""What an agent takes in RAM and on disk, measured, beside what the shape of the model says it must take."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from warmkv import v1 as pb

FP16_BYTES = 2
# Scale and bias of a quantisation group, 16 bits each.
GROUP_OVERHEAD_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """An agent of `tokens` tokens. All sizes in bytes; None where it cannot be measured.

    Attributes:
        hot_bytes, warm_bytes: what the server says the agent holds in RAM and on disk.
        hot_tier_bytes, data_dir_bytes: how much the server's gauges grew when the agent was made.
        file_bytes: sizes of the block files in the data directory, as the file system has them.
        process_bytes: resident set of the server process, model included.
        formula_bytes: from layers, bits and group size. `reported_formula_bytes`: `kv_bytes_per_token` x tokens.
        fp16_bytes: the same caches without quantisation.
    """

    context_tokens: int
    tokens: int
    hot_bytes: int
    warm_bytes: int
    hot_tier_bytes: int
    data_dir_bytes: int
    file_bytes: int | None
    process_bytes: int | None
    formula_bytes: int
    reported_formula_bytes: int
    fp16_bytes: int


def cache_bytes(layers: Iterable[pb.LayerInfo], tokens: int, group_size: int, *, fp16: bool = False) -> int:
    """Bytes of the attention caches of a context: the arithmetic, with no overhead of files or allocators.

    A layer holds kv_heads x (key_dim + value_dim) values for each token that it keeps: all, or the last `window`. A
    quantised value takes `kv_bits` bits and its part of a group's 16-bit scale and bias. Recurrent states are left
    out: they do not grow with the context.

    Args:
        fp16: as if every value took 16 bits.
    """
    total = 0
    for layer in layers:
        if layer.cache_kind == pb.CACHE_KIND_COMPOSITE:
            total += cache_bytes(layer.members, tokens, group_size, fp16=fp16)
            continue
        kept = min(tokens, layer.window) if layer.window else tokens
        values = kept * layer.kv_heads * (layer.key_dim + layer.value_dim)
        if fp16 or not layer.kv_bits or not group_size:
            total += values * FP16_BYTES
        else:
            total += values * layer.kv_bits // 8 + values // group_size * GROUP_OVERHEAD_BYTES
    return total


def memory_row(
    context: int,
    agent: pb.Agent,
    info: pb.GetServerInfoResponse,
    before: pb.ServerGauges,
    after: pb.ServerGauges,
    data_dir: Path | None,
    pid: int | None,
) -> MemoryRow:
    """The row of an agent that was made between the two readings of the gauges."""
    tokens = agent.token_count
    return MemoryRow(
        context_tokens=context,
        tokens=tokens,
        hot_bytes=agent.hot_bytes,
        warm_bytes=agent.warm_bytes,
        hot_tier_bytes=after.hot_bytes - before.hot_bytes,
        data_dir_bytes=after.disk_bytes - before.disk_bytes,
        file_bytes=None if data_dir is None else block_file_bytes(data_dir),
        process_bytes=None if pid is None else resident_bytes(pid),
        formula_bytes=cache_bytes(info.layers, tokens, info.kv_group_size),
        reported_formula_bytes=info.kv_bytes_per_token * tokens,
        fp16_bytes=cache_bytes(info.layers, tokens, info.kv_group_size, fp16=True),
    )


def block_file_bytes(data_dir: Path) -> int:
    """Sum of the sizes of the block files under a data directory; one that vanishes meanwhile counts as nothing."""
    total = 0
    for file in data_dir.rglob("*.safetensors"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def resident_bytes(pid: int) -> int | None:
    """Resident set of a process of this machine; None if it cannot be known."""
    status = Path(f"/proc/{pid}/status")
    try:
        if status.exists():
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
            return int(line.split()[1]) * 1024
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
        return int(shown.stdout) * 1024
    except (OSError, StopIteration, ValueError, subprocess.CalledProcessError):
        return None
