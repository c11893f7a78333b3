"""The masks of a grammar: what they are made of, that nothing else is chosen, and how rows without one fare."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.engine.runs import Outcome, job_of, outcome, prompt_of, running
from tests.engine.tokenizers import built_in, ids, variant
from warmkv_server.contract.generation import Answer, Finish, Job, Sampling
from warmkv_server.contract.grammar import Grammar, GrammarKind
from warmkv_server.engine.engine import Engine
from warmkv_server.engine.output.answer_text import Spelling
from warmkv_server.engine.output.constraint import Constraint, RanOut, Vocabulary, bias_of
from warmkv_server.errors import ConstraintTooComplex, InvalidField, Unsupported
from warmkv_server.text.grammars import complaint
from warmkv_server.text.trial import Trial

END = 1
PLATE = Grammar(GrammarKind.REGEX, ("[A-Z]{2}-[0-9]{3}",))
LIST = Grammar(
    GrammarKind.JSON_SCHEMA, ('{"type":"array","items":{"enum":["alpha","beta"]},"minItems":2,"maxItems":9}',)
)


def vocabulary(tokenizer: TokenizerWrapper, padding: int = 0) -> Vocabulary:
    return Vocabulary(tokenizer, Spelling(tokenizer), len(tokenizer.get_vocab()) + padding, {END})


def allowed(constraint: Constraint) -> set[int]:
    mask = constraint.mask()
    assert mask is not None
    return set(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())


def pieces() -> TokenizerWrapper:
    """A vocabulary as SentencePiece has it: words with a mark for the space before them, and bytes for the rest."""
    words = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁a",
        "a",
        "b",
        "ab",
        "▁ab",
        "é",
        '"',
        "▁{",
    ]
    backend = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [("a", "b")], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made: Any = PreTrainedTokenizerFast
    made = made(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    return TokenizerWrapper(made, eos_token_ids=[END])


@pytest.mark.parametrize("made", [built_in, pieces], ids=["bytes", "pieces"])
def test_each_token_has_the_bytes_that_answers_are_decoded_to(made: Callable[[], TokenizerWrapper]) -> None:
    tokenizer = made()
    known, spelling = vocabulary(tokenizer), Spelling(tokenizer)
    anchor = ids(tokenizer, "ab")
    before = spelling.text(anchor)
    compared = 0
    for token in tokenizer.get_vocab().values():
        written = spelling.text([*anchor, token]).removeprefix(before)
        if token not in tokenizer.all_special_ids and "\ufffd" not in written and token not in spelling.bytes:
            assert known.tokens.decode_bytes([token]) == written.encode(), token
            compared += 1
    assert compared > 0.9 * (len(tokenizer.get_vocab()) - len(spelling.bytes) - 256)
    for byte, token in enumerate(sorted(spelling.bytes)[:255]):  # the last one is in no text
        assert known.tokens.decode_bytes([token]) == bytes([byte])


def test_a_tokenizer_whose_text_is_another_than_its_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="not known"):
        vocabulary(variant(tmp_path, decoder={"type": "Replace", "pattern": {"String": "e"}, "content": "x"}))
    with pytest.raises(Unsupported, match="no token ends"):
        Vocabulary(built_in(), Spelling(built_in()), 4096, ())


def test_padded_ids_and_special_tokens_are_never_allowed_and_the_end_only_at_the_end() -> None:
    tokenizer = built_in()
    known = vocabulary(tokenizer, padding=37)
    anything = Constraint.compile(Grammar(GrammarKind.REGEX, (".{3,5}",)), known)
    special = set(tokenizer.all_special_ids)
    assert allowed(anything).isdisjoint(special | set(range(known.width - 37, known.width + 8)))
    anything.take(ids(tokenizer, "abc"))
    assert allowed(anything) & special == {END}
    anything.take([END])
    assert anything.mask() is None
    anything.go_back(1)
    assert END not in allowed(anything)


def test_going_back_is_as_if_nothing_had_been_taken() -> None:
    tokenizer = built_in()
    known = vocabulary(tokenizer)
    text = ids(tokenizer, '["alpha", "beta"]')
    constraint = Constraint.compile(LIST, known)
    masks = []
    for token in text:
        masks.append(allowed(constraint))
        constraint.take([token])
    assert allowed(constraint) == {END}
    for place in reversed(range(len(text))):
        constraint.go_back(place)
        assert allowed(constraint) == masks[place]
        assert all(token in mask for token, mask in zip(text[place:], masks[place:], strict=True))
    with pytest.raises(RanOut):
        constraint.take(ids(tokenizer, "no list"))


def test_what_is_forced_is_one_of_the_ways_to_go_on() -> None:
    tokenizer = built_in()
    constraint = Constraint.compile(
        Grammar(GrammarKind.CHOICES, ("Friday the 13th", "Friday the 14th")), vocabulary(tokenizer)
    )
    forced = constraint.forced(16)
    assert len(forced) > 1
    assert "Friday the 13th".startswith(tokenizer.decode(forced))
    guess, masks = constraint.masks(forced)
    assert (guess, len(masks)) == (forced, len(forced) + 1)
    constraint.go_back(0)
    assert constraint.forced(1) == forced[:1]
    constraint.take(ids(tokenizer, "Friday the 13th"))
    assert constraint.forced(4) == [END]
    guess, masks = constraint.masks([END, END])
    assert (guess, masks[1:]) == ([END], [None])


@pytest.mark.parametrize("width", [9, 64, 77])
def test_the_mask_is_added_bit_by_bit(width: int) -> None:
    bits = np.random.default_rng(width).integers(0, 2, width).astype(np.uint8)
    mask = np.packbits(bits, bitorder="little")
    bias = bias_of([mask, None], width, mx.float16)
    assert bias.shape == (2, width)
    assert (np.isneginf(np.array(bias[0])) == (bits == 0)).all()
    assert not np.array(bias[1]).any()


def held(engine: Engine, grammar: Grammar, **answer: Any) -> Any:
    """Run one job under a grammar."""

    async def run() -> Outcome:
        constraint = await engine.constrain(grammar, "")
        return await outcome(engine.submit(Job(prompt_of(40), answer=Answer(grammar=grammar, **answer)), constraint))

    return run()


async def test_rows_with_and_without_a_grammar_share_a_batch_and_give_what_they_give_alone() -> None:
    """Greedy rows, rows that draw and rows that report, in one batch."""
    ways: list[dict[str, Any]] = [{}, {"sampling": Sampling(temperature=1.0, seed=5)}, {"top_logprobs": 3}]
    async with running("builtin:tiny", kv_bits=0, force_tokens=0) as engine:
        alone = [(await held(engine, LIST, **way)).tokens for way in ways]
        free = (await outcome(engine.submit(job_of(prompt_of(40), 40)))).tokens
        together = await asyncio.gather(
            *(held(engine, LIST, **way) for way in ways), outcome(engine.submit(job_of(prompt_of(40), 40)))
        )
        assert [each.tokens for each in together] == [*alone, free]
        for each in together[:3]:
            assert each.finished.finish is Finish.STOP
            assert set(json.loads(each.text)) <= {"alpha", "beta"}


async def test_a_grammar_binds_whatever_else_is_wanted() -> None:
    """A token that the grammar has not stays impossible, whatever its bias; penalties are for what was chosen."""
    tokenizer = built_in()
    wanted = ids(tokenizer, "x")[0]
    odd = Sampling(temperature=2.0, seed=1, logit_bias={wanted: 100.0}, repetition_penalty=1.3, top_p=0.9, min_p=0.01)
    async with running("builtin:tiny") as engine:
        for seed in range(3):
            found = await held(engine, PLATE, sampling=odd, max_tokens=20 + seed)
            assert found.finished.finish is Finish.STOP
            assert wanted not in found.tokens


async def test_a_model_that_keeps_no_token_to_cut_is_held_to_a_grammar_too(folder_of: Callable[[str], Path]) -> None:
    async with running(folder_of("mamba2")) as engine:
        found = await held(engine, PLATE, max_tokens=30)
        assert found.finished.finish is Finish.STOP
        assert found.finished.forced == 0


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2024-04-31", "0000-01-01"]),
        ("time", ["23:59:59Z", "00:00:00.125+01:30"], ["23:59:60Z", "24:00:00Z", "12:00:00"]),
        ("date-time", ["2024-02-29T12:00:00Z"], ["2023-02-29T12:00:00Z", "2024-02-29T23:59:60Z"]),
    ],
)
def test_dates_are_days_that_there_are(form: str, good: list[str], bad: list[str]) -> None:
    tokenizer = built_in()
    known = vocabulary(tokenizer)
    for schema in ({"format": form}, {"anyOf": [{"properties": {}, "format": form, "pattern": "."}]}):
        grammar = Grammar(GrammarKind.JSON_SCHEMA, (json.dumps({"type": "string"} | schema),))
        for text in (*good, *bad):
            constraint = Constraint.compile(grammar, known)
            try:
                constraint.take(ids(tokenizer, json.dumps(text)))
                taken = END in allowed(constraint)
            except RanOut:
                taken = False
            assert taken == (text in good), text


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"enum": ["\\u0001"]}', Unsupported),
        ('{"items": {"not": {}}}', Unsupported),
        ('{"properties": {"multipleOf": {"type": "number"}}, "const": {"multipleOf": 0.5}}', None),
        ('{"allOf": [{"minimum": "2"}]}', InvalidField),
        ("[1]", InvalidField),
        ('{"anyOf": [' + ",".join(['{"type": "null"}'] * 5001) + "]}", ConstraintTooComplex),
    ],
)
def test_a_schema_is_tried_before_it_is_used(text: str, error: type[Exception] | None) -> None:
    trial = Trial(Grammar(GrammarKind.JSON_SCHEMA, (text,)))
    if error is None:
        trial.run()
    else:
        with pytest.raises(error):
            trial.run()


def test_where_the_library_gives_up_its_makers_words_stay_here() -> None:
    """As it does where the schemas of many tools are too much together."""
    found = complaint(PLATE, "panic: assertion failed: symbols.len() < u16::MAX <backtrace> 0: <unknown>")
    assert isinstance(found, ConstraintTooComplex)
    assert "panic" not in str(found)
    assert "response_format.regex" in str(found)


@pytest.mark.parametrize(
    "written", ['root ::= "yes" | "no" number\nnumber ::= [0-9]+', 'start: "yes" | "no" NUMBER\nNUMBER: /[0-9]+/']
)
def test_a_grammar_as_other_servers_take_it(written: str) -> None:
    grammar = Grammar(GrammarKind.GBNF, (written,))
    Trial(grammar).run()
    made = Constraint.compile(grammar, vocabulary(built_in()))
    starts = {built_in().decode([token])[:1] for token in allowed(made) - {END}}
    assert starts == {"y", "n"}


@pytest.mark.parametrize("written", ["root ::= ((((", "", 'root ::= "a" other'])
def test_a_grammar_that_is_none(written: str) -> None:
    with pytest.raises(InvalidField, match="grammar"):
        Trial(Grammar(GrammarKind.GBNF, (written,), place="grammar")).run()
