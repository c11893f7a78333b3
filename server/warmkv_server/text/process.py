"""The entry of the processes that do text work: `python -m warmkv_server.text.process SOCKET`.

Here is what has to be done before anything else is imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def without_mlx() -> Iterator[None]:
    """Import mlx-lm's tokenizers without the rest of it, which imports MLX: a process with MLX must not fork.

    Whoever imports mlx-lm after the block gets all of it.
    """
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    package = ModuleType("mlx_lm")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["mlx_lm"] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_lm"]:
            del sys.modules[name]


if __name__ == "__main__":
    with without_mlx():
        from warmkv_server.text.work import main

    main(int(sys.argv[1]))
