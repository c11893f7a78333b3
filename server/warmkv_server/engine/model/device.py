"""What suits the device that MLX computes on, and settings of MLX for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from warmkv_server.engine.cache.codecs import cuda


def prepare() -> None:
    """Settings of MLX for this process; before anything is loaded."""
    if mx.default_device() == mx.cpu:
        # On a CPU, mx.compile runs the system's C++ compiler at run time, which a fresh machine doesn't have.
        mx.disable_compile()


@contextmanager
def limited(freed_bytes: int) -> Iterator[None]:
    """Limits of MLX's memory for the block; afterwards they are as before, and what was kept is the system's again.

    On Metal as much as the system recommends stays wired, so that weights and KV are not paged out between steps.

    Args:
        freed_bytes: of freed memory that may be kept for reuse, where MLX's own limit isn't lower.
    """
    wired = None
    if mx.default_device() != mx.cpu and mx.metal.is_available():
        wired = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    kept = mx.set_cache_limit(freed_bytes)
    if kept < freed_bytes:
        mx.set_cache_limit(kept)
    try:
        yield
    finally:
        mx.set_cache_limit(kept)
        mx.clear_cache()
        if wired is not None:
            mx.set_wired_limit(wired)


def prefill_chunk() -> int:
    """Tokens of one prefill step that suit the device: on a CPU larger ones are slower, a GPU wants more at once."""
    return 256 if mx.default_device() == mx.cpu else 2048


def smallest_chunk() -> int:
    """Tokens of the smallest chunk that is worth while where others wait for it: fewer take about as long."""
    return 256 if cuda.is_available() else 16


def short_prompt() -> int:
    """Tokens of new agents' prompts up to which several are prefilled in one chunk.

    One after the other they take more time in all, but the first of them have their first tokens the sooner. What is
    less on average depends on the device: on a CPU one after the other, but for prompts of four tokens; on CUDA, where
    the host's time is what short chunks cost, one chunk, with 8, 32 and 128 tokens. Metal was not measured.
    """
    return 128 if cuda.is_available() else 0


def describe() -> str:
    """Its kind, and its name where it has one."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    name = str(mx.device_info().get("device_name", ""))
    backend = "metal" if mx.metal.is_available() else "cuda"
    return f"{backend} ({name})" if name else backend
