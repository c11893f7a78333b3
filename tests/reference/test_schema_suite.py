"""The JSON Schema Test Suite as response formats: every answer satisfies its schema, or its keyword is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from llguidance import LLMatcher, LLTokenizer

from tests.e2e.harness import Client, refusal_of, serving, text
from tests.reference import sources
from tests.reference.conftest import fetched
from warmkv import v1
from warmkv_server.contract.grammar import Grammar, GrammarKind
from warmkv_server.errors import WarmKVError
from warmkv_server.text.grammars import LIMITS
from warmkv_server.text.message_grammar import source
from warmkv_server.text.trial import Trial

ROWS = 8
SEEDS = 2


class Group(NamedTuple):
    """A schema, and values that satisfy it or don't."""

    file: str
    name: str
    schema: Any
    tests: list[dict[str, Any]]


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    folder = fetched(sources.schema_suite)
    return [
        Group(str(path.relative_to(folder)), group["description"], group["schema"], group["tests"])
        for path in sorted(folder.rglob("*.json"))
        for group in json.loads(path.read_text())
    ]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("suite") / "data") as (_, client):
        yield client


def validator_of(schema: Any) -> Any:
    own = {k: v for k, v in schema.items() if k != "$schema"} if isinstance(schema, dict) else schema
    return Draft202012Validator(own, format_checker=Draft202012Validator.FORMAT_CHECKER)


def keywords(schema: Any) -> set[str]:
    """Every word that a schema has for a key."""
    if isinstance(schema, dict):
        return set(schema).union(*map(keywords, schema.values()))
    return set().union(*map(keywords, schema)) if isinstance(schema, list) else set()


def outcome(client: Client, group: Group, closing: dict[int, float]) -> str:
    """What became of a group.

    Args:
        closing: what comes soon where it may, so that answers end.
    """
    wanted = v1.ResponseFormat(json_schema=json.dumps(group.schema))
    ended = 0
    for seed in range(SEEDS):
        sampling = v1.SamplingParams(temperature=1.0, seed=seed, logit_bias=closing)
        try:
            answer = client.generate(
                "", text("As JSON: "), response_format=wanted, sampling=sampling, max_tokens=64, ignore_eos=False
            )
        except grpc.RpcError as error:
            refusal = refusal_of(error)
            if "Unsatisfiable" in refusal.message or "no text is" in refusal.message:
                return "of no value"
            if refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                continue
            assert refusal.reason in ("UNSUPPORTED", "INVALID_FIELD"), (group, refusal)
            words = set(re.findall(r"[$\w]+", refusal.message))
            assert words & keywords(group.schema), (group, refusal)
            return "refused"
        if answer.finished.finish_reason == v1.FINISH_REASON_STOP:
            assert validator_of(group.schema).is_valid(json.loads(answer.text)), (group, answer.text)
            ended += 1
    return "answered" if ended else "begun"


def test_no_answer_is_wrong_and_each_refusal_names_its_keyword(client: Client, groups: list[Group]) -> None:
    closing = {end.token_id: 20.0 for end in client.info().end_tokens}
    for mark in ('"', "}", "]"):
        closing[client.count(text(mark)).token_ids[-1]] = 6.0
    with ThreadPoolExecutor(ROWS) as threads:
        found = Counter(threads.map(lambda group: outcome(client, group, closing), groups))
    print(f"of {len(groups)} schemas: {dict(found)}")
    assert found["answered"] > 150


def test_no_value_is_taken_that_is_none(groups: list[Group]) -> None:
    """Whatever the model would say: values that don't satisfy the schema are not in its language."""
    tokens = LLTokenizer("byte")
    counted: Counter[str] = Counter()
    for group in groups:
        grammar = Grammar(GrammarKind.JSON_SCHEMA, (json.dumps(group.schema),))
        try:
            Trial(grammar).run()
        except WarmKVError:
            continue
        matcher = LLMatcher(tokens, source(grammar), log_level=0, limits=LIMITS)
        for each in group.tests:
            matcher.reset()
            spelled = list(json.dumps(each["data"], ensure_ascii=False).encode())
            taken = matcher.try_consume_tokens(spelled) == len(spelled) and matcher.is_accepting()
            counted[f"{'taken' if taken else 'not'}, {'valid' if each['valid'] else 'invalid'}"] += 1
            # Where validators differ in what white space is, the one that we have decides.
            good = each["valid"] or ("ecmascript" in group.file and validator_of(group.schema).is_valid(each["data"]))
            assert good or not taken, (group, each)
    print(dict(counted))
    assert counted["taken, valid"] > 10 * counted["not, valid"]
