"""A tokenizer for a chat template: the built-in one, with the marks that the template writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import AutoTokenizer

from tests.engine.tokenizers import variant

_MARK = re.compile(
    r"<\|[^|<>\s]{1,40}\|?>|<｜[^｜]{1,40}｜>|</?[a-zA-Z_][a-zA-Z_0-9]{0,29}(?::[a-z]+)?>|\[/?[A-Z_]{3,30}\]|<[^|<>\s]{1,40}\|>|\[e~\["
)
_ROLES = ("user", "assistant", "system", "observation")
_KNOWN = {"<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"}
ANSWER = "The answer is here"


@dataclass(frozen=True)
class Marked:
    """
    Attributes:
        reference: transformers' own.
        end: what ends an answer: the first mark behind one, or the tokenizer's own where the template writes none.
    """

    tokenizer: TokenizerWrapper
    reference: Any
    end: int

    def render(self, messages: list[tuple[str, str]], answer: bool) -> str:
        """As transformers does."""
        listed = [{"role": role, "content": content} for role, content in messages]
        return str(self.reference.apply_chat_template(listed, tokenize=False, add_generation_prompt=answer))


def marked(template: str, room: Path) -> Marked:
    marks = {*_MARK.findall(template), "</s>", "<s>", *(f"<|{role}|>" for role in _ROLES)}

    def made(name: str, eos: str) -> Marked:
        folder = room / name
        folder.mkdir(parents=True)
        tokenizer = variant(folder, special=sorted(marks - _KNOWN), eos=eos, chat_template=template)
        return Marked(tokenizer, AutoTokenizer.from_pretrained(folder), int(tokenizer.convert_tokens_to_ids(eos)))

    plain = made("first", "</s>")
    try:
        written = plain.render([("user", "A question"), ("assistant", ANSWER)], False)
    except Exception:  # one that wants tools
        return plain
    behind = written.rpartition(ANSWER)[2]
    found = min(((behind.find(mark), -len(mark), mark) for mark in marks if mark in behind), default=None)
    return plain if found is None else made("second", found[2])
