"""Undoing and redoing a model's rotation of keys by position.

Keys have a constant part, much larger than what tells tokens apart, but only before they are rotated. What a model's
module for rotations does is found out by having it rotate a pattern: so all kinds and scalings of them are known that
turn pairs of values by an angle that is a function of the position, and others are told from them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from warmkv_server.engine.cache.codecs.codec import Position

MOST_BYTES = 512 << 20
"""Of a table of positions."""

BEHIND = 4096
"""Rows of a table behind the last position that is served: caches have memory for some more."""

_TOLERANCE = 1e-3
"""Of a rotation from the table against the module's own, both in 32 bits, relative to what is rotated."""


class UnknownRotationError(Exception):
    """The module does something else than turning pairs, or there are too many positions; the message says which."""


class Rotation:
    """Cosines and sines of every position.

    A rotated vector is `x * cosines + turned(x) * sines`, where `turned` exchanges the two of each pair.

    Attributes:
        rows: (positions, 2, head_dim): cosines and sines, a scaling of lengths included.
        partner: of each value of a head, the index of the one that it is paired with; its own where it has none.
        gain: what rotating and turning back multiplies each value by, (head_dim,).
    """

    def __init__(self, rows: mx.array, partner: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self.rows = rows
        self.partner = partner
        first = np.array(rows[0], dtype=np.float64)
        self.gain = first[0] ** 2 + first[1] ** 2
        self._at: tuple[int | tuple[int, ...], int] | None = None
        self._found: dict[tuple[int, int, bool], mx.array] = {}

    @classmethod
    def of(cls, module: Any, head_dim: int, positions: int) -> Rotation:
        """What a module does with heads of this width.

        Raises:
            UnknownRotationError
        """
        if (positions + BEHIND) * head_dim * 8 > MOST_BYTES:
            raise UnknownRotationError(f"a table of {positions} positions is too large")
        try:
            partner = _partners(module, head_dim)
            order = np.arange(head_dim)
            # Ones in the first of each pair, and in what isn't turned: cosines come there, and sines in the other.
            pattern = (order <= partner).astype(np.float32)
            turned = np.array(_turn(module, mx.array(pattern), 0, positions), dtype=np.float32)
            turned = np.pad(turned, ((0, BEHIND), (0, 0)), mode="edge")
        except UnknownRotationError:
            raise
        except Exception as error:
            raise UnknownRotationError(f"{type(module).__name__} can't be tried: {error}") from error
        first = np.minimum(order, partner)
        second = np.maximum(order, partner)
        cosines = turned[:, first]
        sines = np.where(order < partner, -1, np.where(order > partner, 1, 0)).astype(np.float32) * turned[:, second]
        rows = mx.array(np.stack([cosines, sines], axis=1))
        found = cls(rows, partner)
        found._check(module, positions)
        return found

    def _check(self, module: Any, positions: int) -> None:
        dims = self.rows.shape[-1]
        x = mx.random.normal((1, 2, 8, dims), key=mx.random.key(0))
        for start in {0, 1, 100, max(0, positions - 8)}:
            if start + 8 > positions and start:
                continue
            own = module(x, offset=start).astype(mx.float32)
            mine = self.turn(x, start)
            back = self.turn_back(mine, start)
            far = max(float(mx.abs(own - mine).max()), float(mx.abs(back - x).max()))
            if not far < _TOLERANCE * float(mx.abs(x).max()):
                raise UnknownRotationError(f"{type(module).__name__} doesn't turn pairs by their position alone")

    def turn(self, x: mx.array, start: int) -> mx.array:
        """Rotated, (rows, heads, tokens, head_dim)."""
        cosines, sines = self._apart(start, x.shape[-2])
        return x * cosines + x[..., mx.array(self.partner)] * sines

    def turn_back(self, x: mx.array, start: int) -> mx.array:
        """Undoes `turn`."""
        cosines, sines = self._apart(start, x.shape[-2])
        return (x * cosines - x[..., mx.array(self.partner)] * sines) / mx.array(self.gain, mx.float32)

    def _apart(self, start: int, tokens: int) -> tuple[mx.array, mx.array]:
        rows = self.rows[start : start + tokens]
        return rows[:, 0], rows[:, 1]

    def matrix(self, position: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The rotation to a position, for vectors on its left."""
        cosines, sines = np.array(self.rows[position], dtype=np.float64)
        dims = len(cosines)
        turned = np.zeros((dims, dims))
        turned[np.arange(dims), np.arange(dims)] = cosines
        turned[self.partner, np.arange(dims)] += sines
        return turned

    def at(self, start: Position, tokens: int, heads: int, still: int = 0, *, flat: bool = False) -> mx.array:
        """Cosines and sines of the tokens, (rows, heads, tokens, 2, head_dim) or what broadcasts to it.

        Args:
            still: so many heads follow that are not rotated.
            flat: cosines and sines behind each other, along one axis.
        """
        at = None if isinstance(start, mx.array) else (start, tokens)
        if at is None or at != self._at:
            self._at, self._found = at, {}
        key = (heads if still else 0, still, flat)
        if key not in self._found:
            rows = self.rows[start : start + tokens][None] if isinstance(start, int) else self._gathered(start, tokens)
            turned = self._with_still(rows[:, None], heads, still)
            self._found[key] = turned.flatten(-2) if flat else turned
        return self._found[key]

    def _gathered(self, start: tuple[int, ...] | mx.array, tokens: int) -> mx.array:
        # Rows of a batch are padded on their left: what is there has no position, and any will do.
        return self.rows[mx.maximum(positions_of(start, tokens), 0)]

    def _with_still(self, rows: mx.array, heads: int, still: int) -> mx.array:
        if not still:
            return rows
        many, _, tokens, _, dims = rows.shape
        unturned = mx.stack([mx.ones((dims,)), mx.zeros((dims,))])
        return mx.concatenate(
            [
                mx.broadcast_to(rows, (many, heads, tokens, 2, dims)),
                mx.broadcast_to(unturned, (many, still, tokens, 2, dims)),
            ],
            axis=1,
        )


def signature_of(module: Any, head_dim: int) -> bytes:
    """What tells a module that rotates from another one.

    Raises:
        UnknownRotationError
    """
    try:
        return np.array(_turn(module, mx.ones((head_dim,)), 0, 64)).tobytes()
    except UnknownRotationError:
        raise
    except Exception as error:
        raise UnknownRotationError(f"{type(module).__name__} can't be tried: {error}") from error


def positions_of(start: tuple[int, ...] | mx.array, tokens: int) -> mx.array:
    """Of the tokens of rows that begin at different positions, (rows, tokens)."""
    first = mx.array(start).reshape(-1, 1)
    return first if tokens == 1 else first + mx.arange(tokens)


def _turn(module: Any, x: mx.array, start: int, tokens: int) -> mx.array:
    """A vector, rotated to each of these positions, (tokens, head_dim)."""
    # Not broadcast: on CUDA, MLX rotates rows that share their memory to other values.
    turned: mx.array = module(mx.contiguous(mx.broadcast_to(x, (1, 1, tokens, x.size))), offset=start)
    if turned.shape != (1, 1, tokens, x.size):
        raise UnknownRotationError(f"{type(module).__name__} changes the shape of what it rotates")
    return turned.astype(mx.float32)[0, 0]


def _partners(module: Any, head_dim: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Of each value of a head, the one that it is paired with: found by rotating each by itself."""
    units = mx.eye(head_dim).reshape(head_dim, 1, 1, head_dim)
    moved = np.zeros((head_dim, head_dim), dtype=bool)
    for position in (1, 2, 3):
        turned = module(units, offset=position)
        moved |= np.array(turned.astype(mx.float32)).reshape(head_dim, head_dim) != 0
    partner = np.arange(head_dim)
    np.fill_diagonal(moved, False)
    for value, others in enumerate(moved):
        found = np.flatnonzero(others)
        if len(found) > 1:
            raise UnknownRotationError(f"{type(module).__name__} mixes more than pairs")
        if len(found):
            partner[value] = found[0]
    if not np.array_equal(partner[partner], np.arange(head_dim)):
        raise UnknownRotationError(f"{type(module).__name__} mixes more than pairs")
    return partner
