"""How an operator says what keys and values are to be stored as."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

PRESETS = {"exact": "exact", "near-exact": "o6", "quality": "o4", "compact": "o3"}
"""Names for those who don't want to know more."""

AFFINE, HADAMARD, CALIBRATED, EXACT = "affine", "hadamard", "o", "exact"

_KINDS = {AFFINE: (3, 4, 5, 6, 8), HADAMARD: (3, 4, 5, 6, 8), CALIBRATED: (3, 4, 5, 6, 8), EXACT: (0,)}


class CodecName(NamedTuple):
    """A kind of codec, and the bits of its words; 0 for what is stored as it is computed."""

    kind: str
    bits: int

    def __str__(self) -> str:
        return f"{self.kind}{self.bits}" if self.bits else self.kind


@dataclass(frozen=True)
class KvChoice:
    """Of keys and of values."""

    keys: CodecName
    values: CodecName

    @classmethod
    def read(cls, said: str) -> KvChoice:
        """
        Args:
            said: a preset, a codec (o4, hadamard4, affine4, exact), or one for each side (k=o5,v=o4).

        Raises:
            ValueError: saying what can be said.
        """
        said = PRESETS.get(said, said)
        sides = dict(re.findall(r"(?:^|,)([kv])=([a-z0-9-]+)(?=,|$)", said))
        if set(sides) == {"k", "v"} and said in (f"k={sides['k']},v={sides['v']}", f"v={sides['v']},k={sides['k']}"):
            return cls(_codec(sides["k"]), _codec(sides["v"]))
        both = _codec(said)
        return cls(both, both)

    def __str__(self) -> str:
        return str(self.keys) if self.keys == self.values else f"k={self.keys},v={self.values}"


def _codec(said: str) -> CodecName:
    found = re.fullmatch(r"([a-z]+?)-?(\d*)", PRESETS.get(said, said))
    kind, bits = (found[1], int(found[2] or 0)) if found else ("", 0)
    if bits not in _KINDS.get(kind, ()):
        raise ValueError(
            f"it takes {', '.join(PRESETS)}, or a codec such as o4, hadamard4, affine8 or exact, or one each for keys "
            "and values such as k=o5,v=o4; bits are 3, 4, 5, 6 or 8"
        )
    return CodecName(kind, bits)
