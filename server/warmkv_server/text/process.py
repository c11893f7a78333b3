"""The entry of the processes that do text work: `python -m warmkv_server.text.process SOCKET`.

Here is what has to be done before anything else is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def without_mlx() -> None:
    """Have mlx-lm's tokenizers without the rest of it, which imports MLX: a process with MLX must not fork."""
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    package = ModuleType("mlx_lm")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["mlx_lm"] = package


if __name__ == "__main__":
    without_mlx()
    from warmkv_server.text.work import main

    main(int(sys.argv[1]))
