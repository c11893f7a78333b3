"""A fast BLAS for MLX on Linux CPU.

MLX's CPU wheel brings the reference BLAS, which is about fifty times slower at large products than a tuned one. The
wheel resolves the BLAS symbols at load time, so a tuned library that is loaded globally before `mlx.core` takes their
place. That is why `warmkv_server/__init__.py` calls `preload()` before anything else of the package runs.

This module imports neither MLX nor anything of the package.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

_STOCK = "reference"
_loaded: str | None = None


def preload() -> str:
    """Load the fastest BLAS this machine has, once, and return its name.

    Looks at `WARMKV_BLAS` (`mkl`, `openblas`, `reference`, or a library's path), then for MKL as Python's package
    installs it, then for the system's OpenBLAS. Does nothing where MLX doesn't use a BLAS of the system (macOS).
    """
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


def describe() -> str:
    """The BLAS in use: `mkl (path)`, `openblas (path)`, `accelerate` on macOS, or `reference`."""
    return preload()


def is_reference() -> bool:
    """Whether MLX runs on its slow built-in BLAS."""
    return describe() == _STOCK


def _load() -> str:
    if sys.platform == "darwin":
        return "accelerate"
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return _STOCK
    wanted = os.environ.get("WARMKV_BLAS", "").strip()
    for name, path in _candidates(wanted):
        if name == "mkl":
            _set_mkl_defaults()
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return f"{name} ({path})"
    return _STOCK


def _candidates(wanted: str) -> Iterator[tuple[str, str]]:
    if wanted == _STOCK:
        return
    if wanted and wanted not in ("mkl", "openblas"):
        yield ("mkl" if "mkl" in Path(wanted).name else "custom", wanted)
        return
    if wanted in ("", "mkl") and platform.machine() in ("x86_64", "AMD64"):
        for path in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"), reverse=True):
            yield "mkl", str(path)
    if wanted in ("", "openblas") and (found := ctypes.util.find_library("openblas")):
        yield "openblas", found


def _set_mkl_defaults() -> None:
    # By default MKL may take another code path when a buffer is aligned differently, so that the same request gives
    # other bits on another day. Conditional numerical reproducibility pins the path; what the operator set wins.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")
    # By default MKL's threads spin for 0.2 seconds after each product, on the cores that MLX's own thread, Python and
    # the network need meanwhile. With no spinning a step of the built-in model takes half the time on two cores.
    os.environ.setdefault("KMP_BLOCKTIME", "0")
