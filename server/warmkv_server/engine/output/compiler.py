"""Grammars of requests, compiled off the event loop and off the MLX thread."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from hashlib import blake2b

from warmkv_server.contract.grammar import Grammar
from warmkv_server.engine.output.constraint import Constraint, Vocabulary

_AT_ONCE = 2
"""Grammars that are compiled beside each other; others wait."""
_REMEMBERED = 256
"""Grammars that were tried and can be followed, by digest."""


class Compiler:
    """Used on one event loop.

    A grammar is compiled for each request: what is compiled remembers what it was asked, within bounds, and one
    request's answer would use up another's.

    Args:
        vocabulary: makes the model's, with the first request that has a grammar.
        try_out: tries a grammar where it does no harm; raises what is wrong with it.
    """

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], try_out: Callable[[Grammar, str], Awaitable[None]]
    ) -> None:
        self._make_vocabulary = vocabulary
        self._try_out = try_out
        self._vocabulary: Vocabulary | None = None
        self._making = asyncio.Lock()
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._tried: OrderedDict[bytes, None] = OrderedDict()

    async def compile(self, grammar: Grammar, tenant: str) -> Constraint:
        """
        Raises:
            InvalidField, Unsupported, ConstraintTooComplex: if it can't be followed.
            QueueFull, Draining: as all text work.
        """
        vocabulary = await self.vocabulary()
        digest = _digest(grammar)
        if digest not in self._tried:
            await self._try_out(grammar, tenant)
            self._tried[digest] = None
            if len(self._tried) > _REMEMBERED:
                self._tried.popitem(last=False)
        self._tried.move_to_end(digest)
        async with self._room:
            return await asyncio.to_thread(Constraint.compile, grammar, vocabulary)

    async def vocabulary(self) -> Vocabulary:
        """The model's, made once.

        Raises:
            Unsupported: if nothing can be enforced with it.
        """
        async with self._making:
            if self._vocabulary is None:
                self._vocabulary = await asyncio.to_thread(self._make_vocabulary)
        return self._vocabulary


def _digest(grammar: Grammar) -> bytes:
    return blake2b(repr(grammar).encode(), digest_size=16).digest()
