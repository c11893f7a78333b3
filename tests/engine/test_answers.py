"""How an answer streams and how it ends, on a model that says known texts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.engine.folders import END
from tests.engine.parrot import write_parrot
from tests.engine.runs import Outcome, check_growth, job_of, outcome, outcomes, running
from tests.engine.tokenizers import built_in, ids
from warmkv_server.contract.generation import Finish, Finished, Job, Progress, Started
from warmkv_server.engine.engine import Engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOX = "The quick brown fox,🙂 jumps over a lazy dog."
WHAT = "what 1"
UNDER = "under"


@dataclass
class Parrot:
    engine: Engine
    cues: Mapping[str, int]
    folder: Path

    async def say(self, text: str, max_tokens: int = 60, **answer: object) -> Outcome:
        job = job_of([self.cues[text]], max_tokens, **{"ignore_eos": False, **answer})
        return await outcome(self.engine.submit(job))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parrot(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Parrot]:
    folder = tmp_path_factory.mktemp("parrot") / "model"
    cues = write_parrot(folder, [FOX, WHAT, UNDER])
    async with running(folder) as engine:
        yield Parrot(engine, cues, folder)


async def test_a_whole_answer(parrot: Parrot) -> None:
    got = await parrot.say(FOX)
    assert got.text == FOX
    assert got.tokens == [*ids(built_in(), FOX), END]
    assert all(len(delta.token_ids) == 1 for delta in got.deltas)
    assert "" in [delta.text for delta in got.deltas], "the bytes of a character have no text until it is whole"
    finished = got.finished
    assert (finished.finish, finished.matched_stop) == (Finish.STOP, "")
    assert finished.completion == tuple(got.tokens)
    check_growth(finished.growth, 0, 1 + len(got.tokens))


async def test_events_come_in_order(parrot: Parrot) -> None:
    prompt = [*ids(built_in(), "word " * 50), parrot.cues[FOX]]
    got = await outcome(parrot.engine.submit(job_of(prompt, 5)))
    kinds = [type(event) for event in got.events]
    assert kinds[0] is Started
    assert kinds.count(Started) == kinds.count(Finished) == 1
    assert kinds[-1] is Finished
    last = max(n for n, event in enumerate(got.events) if isinstance(event, Progress))
    assert got.events[last] == Progress(len(prompt), len(prompt))
    assert kinds[last + 1 : -1] == [type(delta) for delta in got.deltas]
    assert got.finished.prefill_seconds > 0
    assert got.finished.decode_seconds > 0


@pytest.mark.parametrize(
    ("stop", "matched", "text", "last"),
    [
        (["ick bro"], "ick bro", "The qu", " brown"),
        (["brown", "quick"], "quick", "The ", " quick"),
        (["k b", "quick brown fox"], "k b", "The quic", " brown"),
        (["🙂"], "🙂", "The quick brown fox,", "🙂"),
        (["x,🙂 j"], "x,🙂 j", "The quick brown fo", " j"),
        (["The"], "The", "", "The"),
        (["T"], "T", "", "The"),
        (["."], ".", FOX.removesuffix("."), "."),
    ],
)
async def test_a_stop_string(parrot: Parrot, stop: list[str], matched: str, text: str, last: str) -> None:
    """The text ends before it; the tokens up to its last one stay in the context."""
    got = await parrot.say(FOX, stop=tuple(stop))
    finished = got.finished
    assert (finished.finish, finished.matched_stop) == (Finish.STOP_SEQUENCE, matched)
    assert got.text == text
    spoken = FOX[: FOX.index(last) + len(last)]
    assert finished.completion == tuple(ids(built_in(), spoken))
    check_growth(finished.growth, 0, 1 + len(finished.completion))


async def test_a_lone_space_that_is_a_stop_string_ends_the_answer(parrot: Parrot) -> None:
    got = await parrot.say(WHAT, stop=(" ",))
    what, space, _ = ids(built_in(), WHAT)
    assert got.tokens == [what, space]
    assert got.text == "what"
    assert got.finished.completion == (what, space)
    check_growth(got.finished.growth, 0, 3)


async def test_a_stop_string_that_the_end_completes(parrot: Parrot) -> None:
    spaces = await parrot.say(WHAT, max_tokens=2, stop=(" ",))
    assert (spaces.text, spaces.finished.finish) == ("what", Finish.STOP_SEQUENCE)
    assert len(spaces.finished.completion) == 2


@pytest.mark.parametrize("max_tokens", [60, 2])
async def test_text_held_back_for_a_stop_string_that_never_comes(parrot: Parrot, max_tokens: int) -> None:
    got = await parrot.say(UNDER, max_tokens=max_tokens, stop=("under the", "derby"))
    assert got.text == UNDER
    assert got.finished.finish is (Finish.STOP if max_tokens > 2 else Finish.LENGTH)
    assert got.finished.matched_stop == ""


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
async def test_max_tokens(parrot: Parrot, max_tokens: int) -> None:
    got = await parrot.say(FOX, max_tokens=max_tokens)
    assert got.tokens == ids(built_in(), FOX)[:max_tokens]
    assert got.finished.finish is Finish.LENGTH
    assert FOX.startswith(got.text)
    check_growth(got.finished.growth, 0, 1 + max_tokens)


async def test_an_answer_that_is_only_the_end(parrot: Parrot) -> None:
    for max_tokens in (1, 2):
        job = job_of(ids(built_in(), "under"), max_tokens, ignore_eos=False)
        got = await outcome(parrot.engine.submit(job))
        assert (got.tokens, got.text, got.finished.finish) == ([END], "", Finish.STOP)
        check_growth(got.finished.growth, 0, len(job.tokens) + 1)


async def test_ignoring_the_end(parrot: Parrot) -> None:
    got = await parrot.say(UNDER, max_tokens=8, ignore_eos=True)
    assert got.tokens[:3] == [*ids(built_in(), UNDER), END]
    assert (len(got.tokens), got.finished.finish) == (8, Finish.LENGTH)
    assert got.text.startswith(UNDER)


async def test_answers_that_end_at_different_steps_of_a_batch(parrot: Parrot) -> None:
    jobs = [job_of([cue], 60, ignore_eos=False) for cue in parrot.cues.values()]
    for text, got in zip(parrot.cues, await outcomes(parrot.engine, jobs * 2), strict=False):
        assert (got.text, got.finished.finish) == (text, Finish.STOP)


async def test_an_answer_ends_at_the_last_position(parrot: Parrot) -> None:
    async with running(parrot.folder, context_limit=12) as engine:
        assert engine.info.context_limit == 12
        prompt = [*prompt_filler(9), parrot.cues[FOX]]
        got = await outcome(engine.submit(job_of(prompt, 60)))
        assert (len(got.tokens), got.finished.finish) == (2, Finish.LENGTH)
        check_growth(got.finished.growth, 0, 12)


async def test_prefill_alone_has_no_answer(parrot: Parrot) -> None:
    for length in (1, 32, 33, 100):
        got = await outcome(parrot.engine.submit(Job(prompt_filler(length))))
        assert (got.tokens, got.finished.finish, got.finished.completion) == ([], Finish.PREFILLED, ())
        check_growth(got.finished.growth, 0, length)


def prompt_filler(length: int) -> list[int]:
    return [1000 + n for n in range(length)]
