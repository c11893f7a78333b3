"""A program of its own: `python child.py MODEL_DIR`. mlx-lm, timed from inside, with no socket and no other request.

It is run, never imported: the benchmark itself stays free of MLX. It reads requests from standard input, one JSON
object a line, and answers each with one line. Every time is in milliseconds and is taken here, around mlx-lm's own
calls, so that the pipe is in none of them.

Prefixes are filled with random keys and values: what attention costs does not depend on them. They are held the way
WarmKV's hot tier holds them, as 4-bit words with 16-bit scales in groups of 64, but in one piece a layer, which favours
mlx-lm over blocks of 256 tokens.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from typing import Any

mx: Any = import_module("mlx.core")
generate: Any = import_module("mlx_lm.generate")
caches: Any = import_module("mlx_lm.models.cache")

GROUP, BITS = 64, 4
ROOM = 512
"""Tokens that a cache has room for behind its prefix, so that no timed step has to move it."""


class Peer:
    """One model and the prefixes that are held for it, by their length."""

    def __init__(self, folder: str) -> None:
        load: Any = import_module("mlx_lm.utils").load
        self.model, _ = load(folder)
        if mx.default_device() == mx.cpu:
            # As WarmKV: 16-bit products don't go through the BLAS.
            self.model.set_dtype(mx.float32)
        mx.eval(self.model.parameters())
        self._shapes = self._cache_shapes()
        self._words: dict[int, list[Any]] = {}

    def ttft(self, prefix: int, form: str, suffix: list[int], step: int) -> dict[str, Any]:
        """Time to the first token of `suffix` after a held prefix; `dequantised` counts the dequantising."""
        words = self._held(prefix) if prefix else []
        ready = None if form == "dequantised" else self._cache(prefix, form, words)
        began = time.perf_counter()
        cache = ready if ready is not None else self._cache(prefix, "fp", words)
        steps = generate.generate_step(
            mx.array(suffix), self.model, max_tokens=2, prompt_cache=cache, prefill_step_size=step
        )
        next(steps)
        elapsed = time.perf_counter() - began
        steps.close()
        mx.synchronize()
        return {"ms": elapsed * 1e3}

    def decode(self, prefix: int, form: str, suffix: list[int], tokens: int) -> dict[str, Any]:
        """Times of one stream's tokens after a prefix."""
        cache = self._cache(prefix, form, self._held(prefix))
        times = [
            time.perf_counter()
            for _ in generate.generate_step(mx.array(suffix), self.model, max_tokens=tokens, prompt_cache=cache)
        ]
        mx.synchronize()
        return {"ms": [(t - times[0]) * 1e3 for t in times]}

    def batch(self, prefix: int, form: str, suffixes: list[list[int]], tokens: int) -> dict[str, Any]:
        """Times at which BatchGenerator's rows got their tokens, all rows from one prefix length on."""
        rows = [self._cache(prefix, form, self._held(prefix)) for _ in suffixes]
        batch = generate.BatchGenerator(self.model, max_tokens=tokens)
        uids = batch.insert(suffixes, caches=rows)
        del rows
        times: dict[int, list[float]] = {uid: [] for uid in uids}
        while any(len(found) < tokens for found in times.values()):
            for response in batch.next_generated():
                times[response.uid].append(time.perf_counter())
        batch.close()
        mx.synchronize()
        first = min(found[0] for found in times.values())
        return {"ms": [[(t - first) * 1e3 for t in found] for found in times.values()]}

    def _cache_shapes(self) -> list[tuple[Any, ...]]:
        """Of each layer: (kv_heads, key width, value width, dtype), as one token leaves them."""
        probe = caches.make_prompt_cache(self.model)
        self.model(mx.array([[0]]), cache=probe)
        if any(type(layer) is not caches.KVCache for layer in probe):
            raise SystemExit("the comparison is made for models whose layers keep every token")
        return [(c.keys.shape[1], c.keys.shape[3], c.values.shape[3], c.keys.dtype) for c in probe]

    def _held(self, prefix: int) -> list[Any]:
        if prefix not in self._words:
            held = []
            for heads, key_width, value_width, dtype in self._shapes:
                layer = []
                for width in (key_width, value_width):
                    values = mx.random.normal((1, heads, prefix, width)).astype(dtype)
                    words, scales, biases = mx.quantize(values, group_size=GROUP, bits=BITS)
                    layer.append((words, scales.astype(mx.float16), biases.astype(mx.float16)))
                    mx.eval(layer[-1])
                held.append(layer)
            self._words[prefix] = held
        return self._words[prefix]

    def _cache(self, prefix: int, form: str, words: list[Any]) -> list[Any]:
        """A cache that holds the prefix: `fp` as mlx-lm's own KVCache, `q4` as its QuantizedKVCache."""
        if not prefix:
            return list(caches.make_prompt_cache(self.model))
        made = [self._layer(form, prefix, layer, shape[-1]) for layer, shape in zip(words, self._shapes, strict=True)]
        mx.eval([cache.state[:2] for cache in made])
        return made

    def _layer(self, form: str, prefix: int, layer: Any, dtype: Any) -> Any:
        room = prefix + ROOM
        if form == "q4":
            cache = import_module("q4_batch").Q4Cache(GROUP, BITS)
            pairs = [tuple(_grown(part.astype(_q4_dtype(part, dtype)), room) for part in side) for side in layer]
        else:
            cache = caches.KVCache()
            pairs = [
                mx.dequantize(
                    *(_grown(part.astype(_q4_dtype(part, dtype)), room) for part in side), group_size=GROUP, bits=BITS
                )
                for side in layer
            ]
        cache.keys, cache.values = pairs
        cache.offset = prefix
        return cache


def _q4_dtype(part: Any, dtype: Any) -> Any:
    return part.dtype if part.dtype == mx.uint32 else dtype


def _grown(part: Any, room: int) -> Any:
    return mx.pad(part, [(0, 0), (0, 0), (0, room - part.shape[2]), (0, 0)])


def main(folder: str) -> None:
    peer = Peer(folder)
    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("operation")
        say(getattr(peer, operation)(**request))
        mx.clear_cache()


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
