"""Running out of memory: how MLX says it, on each device."""

from __future__ import annotations

_SIGNS = (
    "unable to allocate",  # MLX's allocators
    "attempting to allocate",  # Metal, of one buffer that is too large
    "insufficient memory",  # Metal, of a command buffer that has failed
    "out of memory",  # CUDA
    "cudaerrormemoryallocation",
)


def ran_out(error: BaseException) -> bool:
    """Whether it was for want of memory that a step has failed. (MLX raises RuntimeError for this as for all else.)"""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS)
