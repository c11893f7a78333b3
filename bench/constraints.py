"""How fast constrained answers are, with what is forced checked several tokens a step, without, and free ones.

    warmkv serve --model DIR --port 50051 --data-dir a
    warmkv serve --model DIR --port 50052 --data-dir b --force-tokens 0
    python bench/constraints.py 127.0.0.1:50051 127.0.0.1:50052

Each prompt is answered in the three ways, one after the other, in an order that changes from prompt to prompt. Speed is
tokens behind the first over the server's time between the first and the last. A free answer has as many tokens.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc

from warmkv import v1

PEOPLE = ("Ada Lovelace", "Alan Turing", "Grace Hopper", "Marie Curie", "Isaac Newton")


def thing(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


WORDS = {"type": "string", "maxLength": 40}
SCHEMAS = {
    "Describe {} as JSON.": thing(name=WORDS, year_of_birth={"type": "integer", "minimum": 0, "maximum": 2030}),
    "Where did {} live? Answer as JSON.": thing(
        person=thing(full_name=WORDS, is_alive={"type": "boolean"}), country_of_residence=WORDS
    ),
    "What is {} known for? Answer as JSON.": thing(
        occupation={"enum": ["mathematician", "physicist", "engineer"]},
        contributions={"type": "array", "items": WORDS, "minItems": 1, "maxItems": 3},
    ),
    "Rate what {} did for science, as JSON.": thing(
        importance_from_one_to_ten={"type": "integer", "minimum": 1, "maximum": 10},
        explanation_in_a_few_words=WORDS,
        would_recommend_reading_about={"type": "boolean"},
    ),
}


class Way:
    """One way to answer, and what it took."""

    def __init__(self, address: str) -> None:
        self.stub = v1.AgentServiceStub(grpc.insecure_channel(address))
        self.tokens = self.forced = self.valid = 0
        self.seconds = 0.0

    def answer(self, prompt: str, schema: dict[str, Any] | None, tokens: int) -> int:
        content = v1.Content(chat=v1.ChatMessages(messages=[v1.ChatMessage(role="user", content=prompt)]))
        request = v1.GenerateRequest(content=content, max_tokens=tokens, ignore_eos=schema is None)
        request.sampling.temperature = 0
        if schema is not None:
            request.response_format.json_schema = json.dumps(schema)
        events = list(self.stub.Generate(request))
        finished = events[-1].finished
        text = "".join(event.delta.text for event in events)
        self.valid += schema is not None and finished.finish_reason == v1.FINISH_REASON_STOP and _is_json(text)
        self.tokens += finished.usage.completion_tokens - 1
        self.forced += finished.usage.forced_tokens
        self.seconds += finished.timings.decode.ToNanoseconds() / 1e9
        return int(finished.usage.completion_tokens)

    def __str__(self) -> str:
        speed = self.tokens / self.seconds
        return f"{self.tokens} tokens, {self.forced} of them forced, {self.valid} answers whole, {speed:.1f} tokens/s"


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def main(forcing: str, plain: str) -> None:
    for measured in (False, True):  # first to warm up
        forced, masked, free = Way(forcing), Way(plain), Way(plain)
        cases = [(prompt.format(name), schema) for name in PEOPLE for prompt, schema in SCHEMAS.items()]
        for number, (prompt, schema) in enumerate(cases if measured else cases[:4]):
            length = masked.answer(prompt, schema, 200) if number % 2 else 0
            length = max(forced.answer(prompt, schema, 200), length)
            if not number % 2:
                masked.answer(prompt, schema, 200)
            free.answer(prompt, None, max(length, 2))
    print(f"forced   {forced}\nmasked   {masked}\nfree     {free}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
