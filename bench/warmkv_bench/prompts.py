"""Prompts of exact lengths, as token ids of the served model.

The ids come from text that the server itself tokenises, so they are ordinary for any model: no special tokens, and no
guess of how many characters make a token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from warmkv_bench.client import Client

POOL_WORDS = 6000
# Fewer distinct first tokens than prompts that are alive together would let a cold prompt share its start with another.
LEAST_FIRST_TOKENS = 64
SYLLABLES = ("ka", "lo", "mi", "ren", "ta", "su", "vel", "dor", "an", "pe", "gri", "sol", "bem", "tu", "ost", "ly")


class Prompts:
    """Makes prompts from a pool of token ids; the same seed and ordinal give the same prompt.

    Prompts of neighbouring ordinals differ in their very first token, so that a server that shares prefixes at any
    token finds nothing to share.
    """

    def __init__(self, pool: Sequence[int], seed: int) -> None:
        self._pool = list(pool)
        self._first = sorted(set(pool))
        self._seed = seed
        if len(self._first) < LEAST_FIRST_TOKENS:
            raise ValueError(
                f"the tokenizer turned {POOL_WORDS} words into {len(self._first)} different tokens; "
                f"prompts need {LEAST_FIRST_TOKENS}"
            )
        random.Random(seed).shuffle(self._first)

    @classmethod
    async def of_server(cls, client: Client, seed: int) -> Prompts:
        """Has the server tokenise a seeded text."""
        ids = await client.token_ids(text_of_words(POOL_WORDS, seed))
        return cls(ids[1:], seed)  # the first may be a beginning-of-sequence token

    def tokens(self, ordinal: int, count: int) -> list[int]:
        """Exactly `count` token ids: a first token of the ordinal's own, and the pool from a random point on."""
        start = random.Random(f"{self._seed}/{ordinal}").randrange(len(self._pool))
        rest = (self._pool[(start + index) % len(self._pool)] for index in range(count - 1))
        return [self._first[ordinal % len(self._first)], *rest]


def text_of_words(count: int, seed: int) -> str:
    """Prose-like text of made-up words with sentence ends."""
    rng = random.Random(f"{seed}/words")
    lexicon = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(1500)]
    words = [
        word + (". " if position % 11 == 10 else " ") for position, word in enumerate(rng.choices(lexicon, k=count))
    ]
    return "".join(words)
