"""Which files of a folder are the model's weights, and whether they are whole.

A folder may hold more than one revision's files. `model.safetensors.index.json` says which are meant; without it the
names do. What isn't meant is left alone, and what is meant must be there.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmkv_server.errors import OperatorError

log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_MOST_HEADER = 100 << 20
"""Bytes of a safetensors header; the format's own limit."""


@dataclass(frozen=True)
class WeightFiles:
    """The files, sorted, and every tensor in them as it is stored: name to (type, shape)."""

    paths: tuple[Path, ...]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


def find(folder: Path) -> WeightFiles:
    """The weights of the model in a folder.

    Raises:
        OperatorError: if a file is missing or cut off, or it isn't clear which files are meant.
    """
    paths = _named(folder)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    owner: dict[str, Path] = {}
    for path in paths:
        for name, stored in _header(folder, path).items():
            if name in tensors:
                raise OperatorError(
                    f"mlx-lm can't load the model in {folder}: the tensor {name} is both in {owner[name].name} and in "
                    f"{path.name}, and nothing says which is meant; take away the files that don't belong to the model"
                )
            tensors[name], owner[name] = stored, path
    ignored = sorted({path.name for path in folder.glob("model*.safetensors")} - {path.name for path in paths})
    if ignored:
        log.warning("%s: %s is not part of the model and is not read", folder, ", ".join(ignored))
    return WeightFiles(tuple(paths), tensors)


def _named(folder: Path) -> list[Path]:
    if (index := folder / _INDEX).is_file():
        return _of_index(folder, index)
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    found = sorted(folder.glob("model*.safetensors"))
    if not found:
        others = [path.name for pattern in ("*.bin", "*.gguf", "*.pth", "*.npz") for path in folder.glob(pattern)]
        hint = f" ({others[0]} is of another format: convert it)" if others else ""
        raise OperatorError(f"the folder {folder} has no model*.safetensors; is the download complete?{hint}")
    sets: dict[tuple[str, int], dict[int, Path]] = {}
    for path in found:
        if match := _SHARD.fullmatch(path.name):
            sets.setdefault((match[1], int(match[3])), {})[int(match[2])] = path
    if not sets:
        return found
    whole = [shards for (_, count), shards in sets.items() if len(shards) == count]
    if len(whole) > 1:
        names = " and ".join(next(iter(shards.values())).name for shards in whole)
        raise OperatorError(
            f"the folder {folder} has several sets of weights (those of {names}) and no {_INDEX}; leave one of them"
        )
    if whole:
        return sorted(whole[0].values())
    (name, count), shards = max(sets.items(), key=lambda item: len(item[1]))
    missing = [f"{name}-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1) if n not in shards]
    raise _incomplete(folder, missing)


def _of_index(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        wrong = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OperatorError(
            f"{index} is no index of weights ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if wrong or not names:
        raise OperatorError(f"{index} names {wrong[0] if wrong else 'no file'}; it must name files of its own folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise _incomplete(folder, missing)
    return [folder / name for name in names]


def _incomplete(folder: Path, missing: list[str]) -> OperatorError:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return OperatorError(f"the folder {folder} lacks {', '.join(missing[:3])}{more}; is the download complete?")


def _header(folder: Path, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes, after a look at whether the file is as long as it says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MOST_HEADER:
                raise ValueError("it has no header of that format")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size < end:
            raise ValueError(f"it is cut off: {path.stat().st_size} of {end} bytes")
        return {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise OperatorError(
            f"mlx-lm can't load the model in {folder}: {path.name} is no whole safetensors file ({error}); "
            "fetch it again"
        ) from error
