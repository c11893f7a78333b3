"""How people write durations."""

from __future__ import annotations

import math

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def seconds(written: str) -> float:
    """
    Args:
        written: a number and a unit, such as 30d.

    Raises:
        ValueError: it is not.
    """
    number, unit = written[:-1], written[-1:]
    try:
        value = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        raise ValueError(
            f"{written!r} is no duration; give a number and a unit of s, m, h, d or w, such as 30d"
        ) from None
    if not 0 <= value < math.inf:
        raise ValueError(f"{written!r} is no duration that can have passed")
    return value
