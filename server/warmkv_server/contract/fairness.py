"""Fairness between tenants where requests wait: tenants take turns, and none keeps the others out of a queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class Tenants:
    """How many tenants share the server: one object, for all who divide something among them."""

    number: int = 1


@dataclass(frozen=True)
class Bound:
    """How many may wait in a queue.

    Attributes:
        most: of all tenants together.
        tenants: A full queue still takes from those that hold less than their equal share of it, so that it never holds
            more than twice as many.
    """

    most: int
    tenants: Tenants = field(default_factory=Tenants)

    def refuses(self, waiting: int, own: int) -> bool:
        """Whether one more may not wait, where so many do, and so many of the same tenant."""
        return waiting >= self.most and own >= max(1, self.most // self.tenants.number)


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

    def come_back(self, tenant: str, item: Item) -> None:
        """Join before the others of its tenant."""
        self._places.insert(0, _Place(tenant, item, ahead=False))

    def go_ahead(self, tenant: str, item: Item) -> None:
        """Join before everybody who is there."""
        self._places.insert(0, _Place(tenant, item, ahead=True))

    def tenants(self) -> set[str]:
        """Those of whom somebody waits."""
        return {place.tenant for place in self._places}

    def firsts(self, rank: Callable[[str], float]) -> list[tuple[str, Item]]:
        """The first of each tenant, those first that joined ahead, then in the order of their tenants' turns.

        Args:
            rank: goes before the turns; the lowest first.
        """
        found: dict[str, _Place[Item]] = {}
        for place in self._places:
            if place.tenant not in found or (place.ahead and not found[place.tenant].ahead):
                found[place.tenant] = place
        places = sorted(found.values(), key=lambda place: (not place.ahead, rank(place.tenant), self._turn(place)))
        return [(place.tenant, place.item) for place in places]

    def take(self, item: Item | None = None) -> Item:
        """Let the first go, or one of the first: its tenant has had a turn."""
        place = self._first() if item is None else next(place for place in self._places if place.item is item)
        self._places.remove(place)
        self._turns += 1
        self._last_turn[place.tenant] = self._turns
        return place.item

    def remove(self, item: Item) -> None:
        """Let somebody go without a turn, if it is there."""
        self._places = [place for place in self._places if place.item is not item]

    def _first(self) -> _Place[Item]:
        return min(self._places, key=lambda place: -1 if place.ahead else self._turn(place))

    def _turn(self, place: _Place[Item]) -> int:
        return self._last_turn.get(place.tenant, 0)
