"""Finding the folder of a model: built in, on this machine, or on a hub."""

from __future__ import annotations

from pathlib import Path

from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from warmkv_server.contract.model import ModelKind
from warmkv_server.errors import OperatorError

BUILT_IN = Path(__file__).parents[2] / "models"
_HUB_PATTERNS = [pattern for pattern in DEFAULT_ALLOW_PATTERNS if not pattern.endswith(".py")]


def locate(spec: str) -> tuple[ModelKind, Path]:
    """The kind and the folder of `builtin:NAME`, `random:SHAPE` (no folder), a folder, or `ORG/NAME[@REVISION]`.

    Raises:
        OperatorError: if there is none, or it can't be fetched.
    """
    scheme, _, name = spec.partition(":")
    if scheme == "builtin":
        folder = BUILT_IN / name
        if not (folder / "config.json").is_file():
            raise OperatorError(f"there is no built-in model {name!r}; the built-in model is builtin:tiny")
        return ModelKind.BUILT_IN, folder
    if scheme == "random":
        return ModelKind.RANDOM, Path()
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise OperatorError(f"the folder {folder} has no config.json; --model takes a folder in mlx-lm's layout")
        return ModelKind.LOCAL, folder
    repo, _, revision = spec.partition("@")
    if repo.count("/") != 1 or spec.startswith(("/", ".", "~")):
        raise OperatorError(
            f"no model at {spec!r}: give builtin:tiny, an existing folder, or ORG/NAME[@REVISION] of a hub"
        )
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(repo, revision=revision or None, allow_patterns=_HUB_PATTERNS)
    except Exception as error:
        summary = (str(error).splitlines() or [type(error).__name__])[0]
        raise OperatorError(
            f"the model {spec!r} could not be fetched from the hub ({summary}); "
            "check the name and the network, or give a local folder"
        ) from error
    return ModelKind.HUB, Path(path)
