"""A program of its own: `python mlx_lm_child.py MODEL`. Reads requests from standard input, one JSON object a line.

It is run, never imported: the benchmark itself stays free of MLX. For each request it writes a line for each token and
one at the end. The prompt caches of the last sessions are kept in memory, and the common prefix of the next prompt is
reused, as a program on mlx-lm would do it.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from itertools import takewhile
from typing import Any

SESSIONS = 10


def main(model_path: str) -> None:
    core, lm = import_module("mlx.core"), import_module("mlx_lm")
    caches = import_module("mlx_lm.models.cache")
    generate = import_module("mlx_lm.generate")
    model, tokenizer = lm.load(model_path)
    held: dict[str, tuple[list[int], Any]] = {}
    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        prompt = tokenizer.encode(request["prompt"])
        tokens, cache = held.pop(request["session"], ([], None))
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, prompt, strict=False)))
        same = min(same, len(prompt) - 1)
        if cache is None or not caches.can_trim_prompt_cache(cache):
            same, cache = 0, caches.make_prompt_cache(model)
        elif len(tokens) > same:
            caches.trim_prompt_cache(cache, len(tokens) - same)
        rest = core.array(prompt[same:])
        answer: list[int] = []
        for token, _ in generate.generate_step(rest, model, max_tokens=request["tokens"], prompt_cache=cache):
            answer.append(int(token))
            say({"token": answer[-1]})
        # The cache knows how far it has come: mlx-lm computes one step ahead.
        held[request["session"]] = ([*prompt, *answer][: cache[0].offset], cache)
        while len(held) > SESSIONS:
            held.pop(next(iter(held)))
        say({"done": True, "prompt_tokens": len(prompt), "cached_tokens": same})


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
