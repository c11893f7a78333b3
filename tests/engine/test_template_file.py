"""What an operator can give that is no chat template."""

from __future__ import annotations

from pathlib import Path

import pytest

from warmkv_server.errors import OperatorError
from warmkv_server.text.template_file import read

WRONG = {
    "nowhere": (None, "is not a file"),
    "empty": (b" \n", "is empty"),
    "long": (b"x" * (1 << 20 | 1), "are the most"),
    "bytes": (b"\xff\xfe{", "UTF-8"),
    "config": (b'{"chat_template": "{{ messages }}"}', "is JSON"),
    "broken": (b"{% for m in messages %}\n{{ m.content }", "line 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_template_is_said_in_a_sentence(name: str, tmp_path: Path) -> None:
    path, (content, word) = tmp_path / name, WRONG[name]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OperatorError, match=word) as refusal:
        read(path)
    assert f"--chat-template {path}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(b"\xef\xbb\xbf{{ messages }}")
    assert read(path) == "{{ messages }}"
