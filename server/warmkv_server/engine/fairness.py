"""Fairness between tenants where requests wait: tenants take turns, and none keeps the others out of a queue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Bound:
    """How many may wait in a queue.

    Attributes:
        most: of all tenants together.
        tenants: that the server knows. A full queue still takes from those that hold less than their equal share of
            it, so that it never holds more than twice as many.
    """

    most: int
    tenants: int = 1

    def refuses(self, waiting: int, own: int) -> bool:
        """Whether one more may not wait, where so many do, and so many of the same tenant."""
        return waiting >= self.most and own >= max(1, self.most // self.tenants)


@dataclass(frozen=True, eq=False)
class _Place(Generic[Item]):
    tenant: str
    item: Item
    ahead: bool


class FairLine(Generic[Item]):
    """A line whose first is the one that has waited longest of the tenant that had its last turn longest ago."""

    def __init__(self) -> None:
        self._places: list[_Place[Item]] = []
        self._turns = 0
        self._last_turn: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Item]:
        return iter([place.item for place in self._places])

    def held_by(self, tenant: str) -> int:
        """How many of a tenant wait."""
        return sum(place.tenant == tenant for place in self._places)

    def join(self, tenant: str, item: Item) -> None:
        self._places.append(_Place(tenant, item, ahead=False))

    def go_ahead(self, tenant: str, item: Item) -> None:
        """Join before everybody who is there."""
        self._places.insert(0, _Place(tenant, item, ahead=True))

    @property
    def first(self) -> Item:
        """Whose turn it is. There must be somebody."""
        return self._first().item

    def take(self) -> Item:
        """Let the first go: its tenant has had a turn."""
        place = self._first()
        self._places.remove(place)
        self._turns += 1
        self._last_turn[place.tenant] = self._turns
        return place.item

    def remove(self, item: Item) -> None:
        """Let somebody go without a turn, if it is there."""
        self._places = [place for place in self._places if place.item is not item]

    def _first(self) -> _Place[Item]:
        return min(self._places, key=lambda place: -1 if place.ahead else self._last_turn.get(place.tenant, 0))
