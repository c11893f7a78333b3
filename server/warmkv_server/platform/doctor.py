"""What a person needs to know about this machine before it serves."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from warmkv_server.platform import blas, memory
from warmkv_server.platform.versions import version_of

_PACKAGES = ("warmkv", "mlx", "mlx-lm", "grpcio", "protobuf", "transformers")
_SIDE = 1024


def findings(data_dir: Path) -> Iterator[tuple[str, str]]:
    """Pairs of a topic and what was found."""
    yield "machine", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    yield "device", _device()
    if mx.default_device() == mx.cpu:
        advice = "; install the `cpu` extra or the system's OpenBLAS" if blas.is_reference() else ""
        yield "blas", blas.describe() + advice
    yield "speed", f"{_gflops():.0f} GFLOP/s (product of two {_SIDE} x {_SIDE} matrices of 32-bit floats)"
    yield "memory", memory.describe()
    for name in _PACKAGES:
        yield name, version_of(name)
    yield "disk", _disk(data_dir)


def _device() -> str:
    if mx.default_device() == mx.cpu:
        return "cpu"
    return f"gpu {mx.device_info().get('device_name', '')}".strip()


def _gflops() -> float:
    """Of the better of two products: the first one pays for warming up."""
    matrix = mx.ones((_SIDE, _SIDE))
    mx.eval(matrix)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        mx.eval(matrix @ matrix)
        seconds.append(time.perf_counter() - began)
    return 2 * _SIDE**3 / min(seconds) / 1e9


def _disk(data_dir: Path) -> str:
    folder = data_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 2**30:.0f} GiB free of {usage.total / 2**30:.0f} for {data_dir.absolute()}"
