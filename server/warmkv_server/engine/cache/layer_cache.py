"""What the engine asks of one layer's cache. A model uses the same object as the class of mlx-lm's that it stands for.

A kind of cache is one class: it names the class that it stands for and takes that one's place wherever a model makes
one. Those that keep keys and values begin with `caches.QuantiseFirst`, which does most of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import mlx.core as mx

from warmkv_server.contract.kv import PartKind
from warmkv_server.engine.cache.attention_shapes import AttentionShapes
from warmkv_server.engine.cache.codecs.codec import Coded, LayerCodec, Position, Words


class Update(NamedTuple):
    """What one call of the model had a layer store.

    Attributes:
        stepped: whether `coded` is what the words are yet to be made of. So it is for updates of one token: what a step
            of decoding costs is the count of its operations, and many words are made at once.
        start: position of the first token.
    """

    coded: Coded
    stepped: bool
    start: Position


class LayerCache(Protocol):
    """Of one sequence, or of the rows of a batch."""

    @property
    def kind(self) -> PartKind: ...

    @property
    def window(self) -> int:
        """Tokens that are looked back on; 0 for all of them."""

    @property
    def log(self) -> Sequence[Update]:
        """What was stored since it was taken last."""

    @property
    def batches(self) -> bool:
        """Whether sequences' caches can be merged to one of their batch."""

    even: bool
    """Of a batch: whether all rows have the same length, so that none is padded on its left."""

    def arrays(self) -> list[mx.array]:
        """Everything that it holds: what to evaluate so that nothing lazy is left behind."""


class TokenCache(LayerCache, Protocol):
    """One that keeps keys and values, (rows, kv_heads, tokens, head_dim), of all tokens or of the last ones."""

    starts: tuple[int, ...] | None
    """Of a batch: the positions of the tokens that the rows are fed next, if they are known."""

    def take(self) -> tuple[Words, Words]:
        """Keys' and values' words of what was stored since the last time."""

    def fill(self, keys: mx.array, values: mx.array, length: int) -> None:
        """Start after `length` tokens, from those of them that matter; behind them there may be room for more."""

    def cut(self, tokens: int) -> None:
        """Forget the last tokens of the last update, which had more of them. For caches that keep every token."""

    def prepare(self, *, right_padding: list[int]) -> None:
        """Of a batch: the last update's rows were padded so behind their ends."""

    def finalize(self) -> None:
        """Have rows end together, that were said to be padded behind their ends."""


if TYPE_CHECKING:

    class Behind:
        """The part of mlx-lm's caches that is used of them here: what `super()` is for a class before one of them."""

        keys: Any
        values: Any
        offset: Any

        def __init__(self, *arguments: Any) -> None: ...

        def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            raise NotImplementedError

        def make_mask(self, *arguments: Any, **named: Any) -> Any: ...

        def trim(self, n: int) -> int:
            raise NotImplementedError

        @classmethod
        def merge(cls, caches: Sequence[Any]) -> Self:
            raise NotImplementedError
else:
    Behind = object


class Kept(Behind):
    """Base of the classes that stand for mlx-lm's.

    Args:
        stands_for: the class of mlx-lm's that such a cache takes the place of.
    """

    standing_for: ClassVar[dict[type, type[Kept]]] = {}

    def __init_subclass__(cls, *, stands_for: type | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if stands_for is not None:
            Kept.standing_for[stands_for] = cls

    @classmethod
    def in_place_of(cls, stock: Any, codec: LayerCodec, shapes: AttentionShapes | None) -> Self | None:
        """One in place of an empty one that a model made; None if that one is of a kind whose content can't be kept.

        Args:
            shapes: those that attention is to be given, for caches of full attention; None where any will do.
        """
        raise NotImplementedError
