"""A program: what a chat template writes behind an answer that ends a conversation.

Reads {"template", "special"} and writes the text, both as JSON. Imports nothing of ours, to start fast.
"""

from __future__ import annotations

import json
import resource
import sys

_ANSWER = "the-earlier-answer"
_BYTES = 4 << 30
_CPU_SECONDS = 20


def main() -> None:
    """Raises whatever the template does."""
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    request = json.load(sys.stdin)
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _ANSWER}]
    written = render_jinja_template([conversation], chat_template=request["template"], **request["special"])
    _, answer, behind = written[0][0].rpartition(_ANSWER)
    if not answer:
        raise ValueError("it doesn't write the answer")
    json.dump(behind, sys.stdout)


if __name__ == "__main__":
    main()
