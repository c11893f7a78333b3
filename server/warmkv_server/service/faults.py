"""The wrong fields of one request: every one of them is told at once."""

from __future__ import annotations

from warmkv_server.errors import ContextTooLong, EmptyContent, InvalidField, Violation
from warmkv_server.service import limits


class Faults:
    """The wrong fields of one request: the first of them, and how many there are."""

    def __init__(self) -> None:
        self._found: list[Violation] = []
        self._empty: list[Violation] = []
        self._more = 0
        self._too_long = ""

    def need(self, good: bool, field: str, description: str) -> None:
        """Note that a field is wrong, and what it must be, unless it is good."""
        if not good:
            self.note(field, description)

    def note(self, field: str, description: str) -> None:
        """Note that a field is wrong, and what it must be."""
        if len(self._found) < limits.VIOLATIONS:
            self._found.append(Violation(field, description))
        else:
            self._more += 1

    def more(self, count: int) -> None:
        """Count wrong fields that aren't named."""
        self._more += count

    def need_content(self, present: bool) -> None:
        if not present:
            self._empty.append(Violation("content", "must not be empty: give text, token_ids or chat"))

    def too_long(self, message: str) -> None:
        """Note that no context could hold the content."""
        self._too_long = message

    def refuse(self) -> None:
        """Raise if anything is wrong.

        Raises:
            InvalidField, or ContextTooLong or EmptyContent if that is all.
        """
        if self._found:
            found = [*self._found, *self._empty]
            message = "; ".join(f"{v.field} {v.description}" for v in found)
            if self._more:
                message = f"{len(found) + self._more} fields are wrong: {message}"
                found.append(Violation("…", f"{self._more} more fields are wrong"))
            raise InvalidField(message, violations=found)
        if self._too_long:
            raise ContextTooLong(self._too_long)
        if self._empty:
            raise EmptyContent("content must not be empty: give text, token_ids or chat", violations=self._empty)
