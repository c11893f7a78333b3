"""Traces in the form that Mooncake published: one JSON object a line.

`timestamp` (milliseconds), `input_length` and `output_length` (tokens), `hash_ids`: one id for each block of 512 tokens
of the input, equal where the input is equal from its start up to and including that block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512


class TraceError(Exception):
    """A trace that cannot be read: one sentence with file, line and what is wrong."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request; `block_tokens` is the length of the blocks that `hash_ids` stand for."""

    due_ms: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]
    block_tokens: int = BLOCK_TOKENS


def read_trace(path: Path, limit: int | None, time_scale: float, length_scale: float) -> list[TraceRequest]:
    """Reads a trace's first `limit` requests in the order of their time.

    Args:
        time_scale: 0.5 sends twice as fast.
        length_scale: 0.25 makes blocks, inputs and outputs a quarter as long.

    Raises:
        TraceError: the file is missing, or a line is not a request.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None
    requests: list[TraceRequest] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(_request(json.loads(line), time_scale, length_scale))
            except (ValueError, KeyError, TypeError) as error:
                raise TraceError(f"{path}, line {number} is not a request of a trace: {error!r}") from None
    requests.sort(key=lambda request: request.due_ms)
    return requests[:limit]


def ideal_cached_tokens(requests: Iterable[TraceRequest]) -> list[int]:
    """What a cache that forgets nothing would have of each request: its longest prefix in any earlier input, in tokens.

    The last token of an input is always computed, to get the first one of the answer.
    """
    # By prefix of hash ids: length of the longest input that has it.
    longest: dict[tuple[int, ...], int] = {}
    found: list[int] = []
    for request in requests:
        cached = 0
        for blocks in range(1, len(request.hash_ids) + 1):
            earlier = longest.get(request.hash_ids[:blocks])
            if earlier is None:
                break
            cached = min(blocks * request.block_tokens, request.input_tokens - 1, earlier)
        found.append(cached)
        for blocks in range(1, len(request.hash_ids) + 1):
            prefix = request.hash_ids[:blocks]
            longest[prefix] = max(longest.get(prefix, 0), request.input_tokens)
    return found


class Sessions:
    """Finds the conversation that a request continues; traces don't name one.

    A request goes on with the session whose last input it holds, as far as that can be told: all of its blocks but the
    last, which was not full. The longest match wins; without one a new session begins.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}
        self._count = 0

    def assign(self, hash_ids: Sequence[int]) -> int:
        """The number of the request's session, from 0."""
        full = tuple(hash_ids[:-1])
        for blocks in range(len(full), 0, -1):
            session = self._last.pop(full[:blocks], None)
            if session is not None:
                break
        else:
            session = self._count
            self._count += 1
        if full:
            self._last[full] = session
        return session


def _request(data: dict[str, object], time_scale: float, length_scale: float) -> TraceRequest:
    hash_ids = data["hash_ids"]
    if not isinstance(hash_ids, list) or not all(isinstance(one, int) for one in hash_ids) or not hash_ids:
        raise ValueError("hash_ids must be a list of whole numbers that is not empty")
    block = max(1, round(BLOCK_TOKENS * length_scale))
    given = _number(data["input_length"])
    if not (len(hash_ids) - 1) * BLOCK_TOKENS < given <= len(hash_ids) * BLOCK_TOKENS:
        raise ValueError(f"input_length {given:g} does not fit {len(hash_ids)} blocks of {BLOCK_TOKENS}")
    scaled = round(given * length_scale)
    return TraceRequest(
        due_ms=_number(data["timestamp"]) * time_scale,
        input_tokens=max((len(hash_ids) - 1) * block + 1, min(len(hash_ids) * block, scaled)),
        output_tokens=max(1, round(_number(data["output_length"]) * length_scale)),
        hash_ids=tuple(hash_ids),
        block_tokens=block,
    )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"{value!r} must be a number of at least 0")
    return float(value)
