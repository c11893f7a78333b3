"""Every class of model that mlx-lm has, tried: a tiny random one is loaded, fed, kept, put back and continued.

    python -m tests.models.zoo            writes the table in docs/models.md
    python -m tests.models.zoo NAME...    tries these and prints what came of it

Each is tried in a process of its own, since one that is broken may take all memory or never end.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from tests.engine.folders import write_model
from tests.engine.spans import compute, distance, filled, from_disk, needed
from tests.models.zoo_configs import config_of, names
from warmkv_server.engine.cache.caches import empty_caches
from warmkv_server.engine.cache.codecs.choose import codecs_for
from warmkv_server.engine.model import load as models
from warmkv_server.errors import OperatorError

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- table of classes: begin -->", "<!-- table of classes: end -->"

SECONDS = 60
TOKENS = [8 + (n * 37) % 240 for n in range(44)]
CHUNKS = [16, 32, 40]
TOLERANCE = 1e-4
"""Of a logit, between a context that ran on and one that was put back."""


def has_model(name: str) -> bool:
    """Whether the module is a class of model and not a part of one."""
    if name == "olmo":
        return True  # its import ends the process
    return hasattr(importlib.import_module(f"mlx_lm.models.{name}"), "Model")


def attempt(name: str) -> str:
    """What comes of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        try:
            write_model(path, config_of(name), build(name))
        except (Exception, SystemExit) as error:
            if name != "olmo":
                return f"not tried: no small one was built ({brief(error)})"
            write_model(path, config_of(name), Module())
        try:
            loaded = models.load(str(path), adapter=None, codecs=codecs_for(4, 32), context_limit=None)
        except OperatorError as error:
            return f"refused: {brief(error).replace(str(path), 'FOLDER')}"
        return run(loaded)


def build(name: str) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(1)
    return module.Model(module.ModelArgs.from_dict(config_of(name)))


def run(loaded: models.LoadedModel) -> str:
    """Prime in chunks, go on, and go on again from the stored words."""
    model, cache_map = loaded.model, loaded.cache_map
    caches = empty_caches(model, cache_map.codecs)
    spans = compute(model, cache_map, caches, TOKENS, 0, CHUNKS)
    follow = mx.array([TOKENS[CHUNKS[-1] :]])
    went_on = model(follow, cache=caches)
    kept = from_disk(needed(spans, cache_map.layout, CHUNKS[-1]))
    again = model(follow, cache=filled(model, cache_map, kept, CHUNKS[-1]))
    kinds = sorted({member.cache_kind for layer in loaded.info.layers for member in layer.members or (layer,)})
    apart = distance(went_on, again)
    if not apart <= TOLERANCE:
        return f"WRONG: a context that was put back is {apart:.2g} apart"
    return f"works ({', '.join(kinds)})"


def brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}…"


def apart(name: str) -> str:
    """`attempt` in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = attempt(name)
        except BaseException as error:
            said = f"FAILS: {type(error).__name__}: {brief(error)}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.05)
    else:
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read() or f"not tried: the attempt didn't end well within {SECONDS} s"


def main() -> None:
    chosen = sys.argv[1:] or names()
    rows = []
    for name in filter(has_model, chosen):
        rows.append(f"| `{name}` | {apart(name).replace('|', '/')} |")
        print(rows[-1], flush=True)
    if not sys.argv[1:]:
        text = DOCUMENT.read_text()
        head, tail = text[: text.index(START) + len(START)], text[text.index(END) :]
        DOCUMENT.write_text("\n".join([head, "| Class | What came of it |", "|---|---|", *rows, tail]))


if __name__ == "__main__":
    main()
