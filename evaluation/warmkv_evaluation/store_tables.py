"""The figures of the store as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from warmkv_evaluation.statistics import median_interval, median_ratio
from warmkv_evaluation.store_growth import Growth
from warmkv_evaluation.store_load import LOAD, NAMES, ROOM, WAYS, LoadTimes
from warmkv_evaluation.store_readers import HASHED, KEPT, PLAIN, READER
from warmkv_evaluation.store_rest import Rest
from warmkv_evaluation.store_save import Save

MIB = 1 << 20


def growth_table(found: Sequence[Growth]) -> str:
    head = (
        "| shape | tokens | a turn | KV, MiB | written, MiB | blocks | index | amplification "
        "| commit at 1K, ms | at the end, ms | ratio |"
    )
    rows = []
    for growth in found:
        written = growth.written_bytes
        short, long = np.array(growth.short_seconds), np.array(growth.long_seconds)
        ratio, (low, high) = median_ratio(long, short)
        rows.append(
            f"| {growth.shape} | {growth.tokens:,} | {growth.turn} | {growth.kv_bytes / MIB:,.1f} "
            f"| {'-' if written is None else f'{written / MIB:,.1f}'} | {growth.block_bytes / MIB:,.1f} "
            f"| {growth.index_bytes / MIB:,.1f} | {growth.amplification:.2f} "
            f"| {_milliseconds(short)} | {_milliseconds(long)} | {ratio:.2f} [{low:.2f}, {high:.2f}] |"
        )
    return _table(head, 1, rows)


def load_table(found: Sequence[LoadTimes]) -> str:
    head = "| shape | tokens | page cache | way | ms | GiB/s | load reaches | load into room reaches |"
    rows = []
    for times in found:
        loads = [np.array(times.seconds[way]) for way in (LOAD, ROOM)]
        for way in WAYS:
            seconds = np.array(times.seconds[way])
            ratios = [median_ratio(seconds, load) for load in loads] if way in PLAIN else []
            shares = [f"{ratio:.0%} [{low:.0%}, {high:.0%}]" for ratio, (low, high) in ratios] or ["", ""]
            rows.append(
                f"| {times.shape} | {times.tokens:,} | {'dropped' if times.dropped else 'warm'} | {NAMES[way]} "
                f"| {_milliseconds(seconds)} | {times.nbytes / float(np.median(seconds)) / (1 << 30):.2f} "
                f"| {shares[0]} | {shares[1]} |"
            )
    return _table(head, 4, rows)


def steps_table(found: Sequence[LoadTimes]) -> str:
    """Where a load's time goes, from the differences of medians; with the page cache warm."""
    head = "| shape | tokens | MiB | load, ms | reading | hashing | headers and arrays | index and event loop |"
    rows = []
    for times in found:
        if not times.dropped:
            kept, hashed, reader, load = (
                1e3 * float(np.median(times.seconds[way])) for way in (KEPT, HASHED, READER, LOAD)
            )
            rows.append(
                f"| {times.shape} | {times.tokens:,} | {times.nbytes / MIB:,.0f} | {load:.1f} "
                f"| {kept:.1f} | {hashed - kept:.1f} | {reader - hashed:.1f} | {load - reader:.1f} |"
            )
    return _table(head, 1, rows)


def join_lines(found: Sequence[LoadTimes]) -> Iterator[str]:
    """One for each shape and size: what joining takes, apart from the load."""
    for times in found:
        if times.dropped:
            continue
        name = f"{times.tokens:,} tokens of {times.shape}"
        need = f"{times.join_bytes / (1 << 30):.1f} GiB"
        if times.join_seconds:
            taken = _milliseconds(np.array(times.join_seconds))
            yield f"Joining {name} into a sequence's caches: {taken} ms, for {need} of new memory."
        else:
            yield f"Joining {name} was not measured: it takes {need} of new memory, more than is free."


def rest_table(found: Sequence[Rest]) -> str:
    head = (
        "| shape | group | tokens | window | RAM, bytes a token | disk, bytes a token | fp16 / RAM | fp16 / disk "
        "| full layers: fp16 / disk | a snapshot, MiB |"
    )
    rows = [
        f"| {rest.shape} | {rest.group_size} | {rest.tokens:,} | {rest.window or '-'} "
        f"| {rest.ram_bytes / rest.tokens:,.0f} | {rest.disk_bytes / rest.tokens:,.0f} "
        f"| {rest.fp16_bytes / rest.ram_bytes:.2f} | {rest.fp16_bytes / rest.disk_bytes:.2f} "
        f"| {rest.append_fp16_bytes / rest.append_file_bytes:.2f} "
        f"| {f'{rest.state_bytes / MIB:.2f}' if rest.state_bytes else '-'} |"
        for rest in found
    ]
    return _table(head, 1, rows)


def save_table(found: Sequence[Save]) -> str:
    head = (
        "| decoding | saving | tokens | MiB | commit, ms | gaps alone | p99, ms | gaps while saving | p99, ms | ratio |"
    )
    rows = [
        f"| {save.model} | {save.shape} | {save.tokens:,} | {save.nbytes / MIB:,.1f} "
        f"| {_milliseconds(np.array(save.commit_seconds))} | {len(save.alone)} "
        f"| {np.percentile(save.alone, 99) * 1e3:.2f} | {len(save.saving)} "
        f"| {np.percentile(save.saving, 99) * 1e3:.2f} | {save.ratio:.2f} |"
        for save in found
    ]
    return _table(head, 2, rows)


def _table(head: str, labels: int, rows: Sequence[str]) -> str:
    columns = head.count("|") - 1
    rule = "|" + "".join("---|" if number < labels else "---:|" for number in range(columns))
    return "\n".join([head, rule, *rows])


def _milliseconds(seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    if len(seconds) < 5:
        return f"{np.median(seconds) * 1e3:.1f}"
    low, high = median_interval(seconds)
    return f"{np.median(seconds) * 1e3:.1f} [{low * 1e3:.1f}, {high * 1e3:.1f}]"
