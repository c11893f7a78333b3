"""How long every string and every list of a request may be. The contract's comments say the same.

The first group is what the wire is looked through for before a message is made of it (wire.py): coarse, and the same
for nearly all fields, so that whatever comes costs little. The second is what each field may have (validate.py).
"""

from __future__ import annotations

from typing import Any

# On the wire.
MESSAGE_FIELDS = 32_768
"""Fields of one message in all, those of the messages in it included; ids are not counted here."""
LIST_ENTRIES = 1_024
"""Entries of a list or map that isn't named below."""
STRING_BYTES = 65_536
"""Bytes of a string that isn't content."""
CHAT_MESSAGES = 8_192
TOKEN_IDS = 2_097_152
NESTING = 64
"""Messages in messages: deeper than any field of ours but `template_variables` has any."""

# Of a field.
COUNTED_TOKENS = 1_000_000
"""Token ids that CountTokens takes, whatever the context limit, and that it returns."""
LOGIT_BIASES = 1_024
LABELS = 64
LABEL_KEY_CHARACTERS = 63
LABEL_VALUE_CHARACTERS = 255
REQUEST_ID_CHARACTERS = 128
ROLE_CHARACTERS = 64
STOPS = 16
CANDIDATES = 16
STOP_CHARACTERS = 256
"""Of one stop string."""
STOPS_CHARACTERS = 2_048
"""Of all of them together."""
TOOLS = 256
TOOL_NAME_CHARACTERS = 64
TOOLS_CHARACTERS = 262_144
"""Of all tools of a request together."""
CALLS = 256
"""Of one message."""
CALL_ID_CHARACTERS = 128
VARIABLES_CHARACTERS = 16_384
"""Of template_variables, as JSON."""
TOP_LOGPROBS = 20
UPDATE_PATHS = 16

VIOLATIONS = 20
"""That a refusal names; the rest it counts."""

SCORED_TOKENS = 256
"""Of one ScoreResponse."""

# Of an answer. Clients take messages of 4 MiB unless they are told to take more.
PAGE_BYTES = 3 << 20
"""Agents on a page."""
DELTA_BYTES, DELTA_CHARACTERS = 2 << 20, 400 << 10
"""Token ids with their log probabilities, and text, which takes up to four bytes a character."""


def about(limit: int, actual: int, unit: str) -> dict[str, Any]:
    """What an error that has to do with a limit says to programs."""
    return {"limit": limit, "actual": actual, "unit": unit}
