"""What agents may be called. A name never becomes one of a file."""

from __future__ import annotations

import re

AGENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
AGENT_ID_RULE = "must be 1 to 128 characters of A-Z a-z 0-9 . _ : -"
