"""Text work in processes of its own: the tokens are those of doing it here, whatever happens to the processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e.waiting import await_that
from tests.engine.tokenizers import built_in, variant
from tests.hostile.others import family
from warmkv_server.contract.content import Chat, ChatMessage, Content, RawText, TokenContent
from warmkv_server.contract.fairness import Bound
from warmkv_server.engine.model.load import BUILT_IN
from warmkv_server.errors import ContextTooLong, Draining, InvalidField, OperatorError, QueueFull
from warmkv_server.text.pool import TextPool
from warmkv_server.text.task import Task, TokenizerSource
from warmkv_server.text.text import Text

SLOW = """\
{%- for m in messages -%}{%- if m.content == 'loop' -%}
{%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- endif -%}{{ m.content }}{%- endfor -%}
"""
WRONG = TokenContent((5, 4096))
LOOP = Chat((ChatMessage("user", "loop"),))


@asynccontextmanager
async def pool(folder: Path = BUILT_IN / "tiny", waiting: int = 100) -> AsyncIterator[TextPool]:
    made = TextPool(Bound(waiting))
    try:
        made.found(TokenizerSource(folder, None, eos_token_ids=(), defaults=None, vocab_size=4096))
        await made.ready()
        yield made
    finally:
        made.stop()


async def processes() -> list[int]:
    """The one that others are forked from, and those: at least two."""

    def running() -> list[int]:
        return [pid for pid in family(os.getpid())[1:] if b"warmkv_server.text.process" in _command(pid)]

    await asyncio.to_thread(await_that, lambda: len(running()) >= 3)
    return running()


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def task(content: Content, room: int | None = None) -> Task:
    return Task(content, starts=True, ending="", held=0, tail=(), answer=True, room=room)


def here(content: Content) -> list[int]:
    new = Text(built_in(), 4096).encode(content, starts=True, ending="", held=0, tail=(), answer=True)
    ids: list[int] = new.tokens.tolist()
    return ids


async def test_tokens_are_those_of_doing_it_here() -> None:
    contents: list[Content] = [
        RawText("hi"),
        RawText("Grüße, \U0001f600 and all"),
        RawText("word " * 10_000),
        Chat((ChatMessage("user", "What is 2 + 2?"), ChatMessage("assistant", "4"), ChatMessage("user", "So?"))),
    ]
    async with pool() as text:
        for content in contents:
            assert (await text.encode(task(content), "")).tokens.tolist() == here(content)
        assert text.bytes_per_token == Text(built_in(), 4096).bytes_per_token > 0
        together = await asyncio.gather(*(text.encode(task(RawText(f"number {n}")), "") for n in range(50)))
        assert [each.tokens.tolist() for each in together] == [here(RawText(f"number {n}")) for n in range(50)]


async def test_refusals_are_those_of_doing_it_here() -> None:
    async with pool() as text:
        with pytest.raises(ContextTooLong):
            await text.encode(task(RawText("word " * 2000), room=10), "")
        with pytest.raises(InvalidField) as caught:
            await text.encode(task(WRONG), "")
        with pytest.raises(InvalidField) as known:
            here(WRONG)
        assert caught.value.violations == known.value.violations


async def test_processes_that_are_killed_are_replaced() -> None:
    async with pool() as text:
        for _ in range(2):
            _, *working = await processes()
            for pid in working:
                os.kill(pid, signal.SIGKILL)
            assert (await text.encode(task(RawText("hi")), "")).tokens.tolist() == here(RawText("hi"))
        os.kill((await processes())[0], signal.SIGKILL)
        assert (await text.encode(task(RawText("hi")), "")).tokens.tolist() == here(RawText("hi"))


async def test_the_short_text_of_one_goes_before_the_long_ones_of_another() -> None:
    async with pool() as text:
        book = task(RawText("It was the best of times. " * 4000))
        long_ones = [asyncio.create_task(text.encode(book, "one")) for _ in range(4)]
        await asyncio.sleep(0)
        await text.encode(task(RawText("hi")), "two")
        assert not all(each.done() for each in long_ones)
        assert len({len(each.tokens) for each in await asyncio.gather(*long_ones)}) == 1


async def test_tenants_take_turns() -> None:
    async with pool() as text:
        order: list[str] = []

        async def encode(tenant: str) -> None:
            await text.encode(task(RawText("It was the best of times. " * 1500)), tenant)
            order.append(tenant)

        floods = [asyncio.create_task(encode("one")) for _ in range(6)]
        await asyncio.sleep(0)
        await encode("two")
        assert order.count("one") <= 3
        await asyncio.gather(*floods)


async def test_a_task_that_nobody_waits_for_is_stopped(tmp_path: Path) -> None:
    variant(tmp_path, chat_template=SLOW)
    async with pool(tmp_path) as text:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(text.encode(task(LOOP), ""), 0.05)
        assert (await text.encode(task(RawText("hi")), "")).tokens.tolist() == here(RawText("hi"))


async def test_a_task_that_takes_too_long_names_the_template(tmp_path: Path) -> None:
    variant(tmp_path, chat_template=SLOW)
    async with pool(tmp_path) as text:
        with pytest.raises(InvalidField, match=r"chat template.*took longer than") as caught:
            await text.encode(task(LOOP), "")
        assert caught.value.violations[0].field == "content.chat.messages"


async def test_so_many_may_wait(tmp_path: Path) -> None:
    variant(tmp_path, chat_template=SLOW)
    async with pool(tmp_path, waiting=1) as text:
        stuck = [asyncio.create_task(text.encode(task(LOOP), "")) for _ in range(8)]
        with pytest.raises(QueueFull):
            await asyncio.gather(*stuck)
        text.stop()
        ended = await asyncio.gather(*stuck, return_exceptions=True)
        assert {type(each) for each in ended} == {QueueFull, Draining}


async def test_after_the_stop_nothing_is_left() -> None:
    async with pool() as text:
        started = await processes()
        text.stop()
        with pytest.raises(Draining):
            await text.encode(task(RawText("hi")), "")
    await_that(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in started))


async def test_a_tokenizer_that_cant_be_loaded_is_the_operators_to_know(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="tokenises"):
        async with pool(tmp_path):
            pass
