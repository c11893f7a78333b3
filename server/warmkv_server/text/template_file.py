"""A chat template that an operator gives in place of the model's own."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import TemplateSyntaxError
from transformers.utils import chat_template_utils

from warmkv_server.errors import OperatorError
from warmkv_server.text.probe import Findings

_MOST_BYTES = 1 << 20
_FLAG = "--chat-template"


def read(path: Path) -> str:
    """
    Raises:
        OperatorError: what is there is no chat template.
    """
    try:
        if not path.is_file():
            raise OperatorError(f"{_FLAG} {path} is not a file; give one with a chat template in Jinja")
        if (nbytes := path.stat().st_size) > _MOST_BYTES:
            raise OperatorError(f"{_FLAG} {path} has {nbytes} bytes, and {_MOST_BYTES} are the most: is it a template?")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OperatorError(f"{_FLAG} {path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise OperatorError(f"{_FLAG} {path} is not text in UTF-8: {error}; give a chat template in Jinja") from error
    if not text.strip():
        raise OperatorError(f"{_FLAG} {path} is empty; give a file with a chat template in Jinja")
    if _is_json(text):
        raise OperatorError(
            f'{_FLAG} {path} is JSON, and not Jinja: take the text of its "chat_template", if it has one, into a file '
            "of its own"
        )
    try:
        chat_template_utils._compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise OperatorError(f"{_FLAG} {path} is not Jinja: line {error.lineno}: {error.message}; mend it") from error
    return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def require_usable(path: Path, findings: Findings) -> None:
    """
    Args:
        findings: of trying it.

    Raises:
        OperatorError: it writes no user's message.
    """
    said = str(findings["template"]["roles"]["user"])
    if not said.startswith("written"):
        raise OperatorError(f"{_FLAG} {path}: a user's message is {said}; give a chat template that writes it")
