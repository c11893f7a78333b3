"""One agent's requests run one after another in order of arrival, and a delete goes first."""

from __future__ import annotations

import asyncio

from warmkv_server.agents.run import Run
from warmkv_server.agents.turns import Turns
from warmkv_server.agents.types import Activity, Doing
from warmkv_server.contract.fairness import Bound
from warmkv_server.contract.names import AgentKey
from warmkv_server.errors import AgentDeleted, QueueFull, RequestCancelled, StorageUnavailable

KEY = AgentKey("", "a")


class Scene:
    """Runs that take turns, hold them until they are let go, and write down who had the turn."""

    def __init__(self, max_waiting: int = 100) -> None:
        self.turns = Turns(Bound(max_waiting))
        self.order: list[str] = []
        self._let_go: dict[str, asyncio.Event] = {}

    def arrive(self, name: str, key: AgentKey = KEY) -> Run[None]:
        self._let_go[name] = asyncio.Event()

        async def work(run: Run[None]) -> None:
            async with self.turns.take(key, run):
                self.order.append(name)
                await self._let_go[name].wait()

        run: Run[None] = Run(name)
        run.start(work)
        return run

    def delete(self, key: AgentKey = KEY) -> Run[int]:
        async def work(run: Run[int]) -> None:
            async with self.turns.overtake(key, run) as overtaking:
                stopped = await overtaking.stop(AgentDeleted("deleted"))
                self.order.append("delete")
                run.publish(stopped)

        run: Run[int] = Run("delete")
        run.start(work)
        return run

    def let_go(self, *names: str) -> None:
        for name in names:
            self._let_go[name].set()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_after_another_in_order_of_arrival() -> None:
    scene = Scene()
    runs = [scene.arrive(name) for name in "abcd"]
    await settle()
    assert scene.order == ["a"]
    scene.let_go(*"dcba")
    for run in runs:
        await run.over.wait()
    assert scene.order == list("abcd")
    assert scene.turns.waiting == 0


async def test_agents_do_not_wait_for_each_other_nor_do_requests_without_one() -> None:
    scene = Scene()
    keys = [KEY, AgentKey("", "b"), AgentKey("other tenant", "a"), AgentKey("", ""), AgentKey("", "")]
    for number, key in enumerate(keys):
        scene.arrive(str(number), key)
    await settle()
    assert scene.order == list("01234")
    scene.let_go(*"01234")


async def test_one_that_gives_up_while_waiting_is_passed_over() -> None:
    scene = Scene()
    a, b, c = (scene.arrive(name) for name in "abc")
    await settle()
    b.stop(RequestCancelled("gone"))
    scene.let_go("a", "c")
    await c.over.wait()
    assert scene.order == ["a", "c"]
    assert isinstance(b.error, RequestCancelled)
    assert a.error is None


async def test_one_that_gives_up_just_as_its_turn_comes_passes_the_turn_on() -> None:
    scene = Scene()
    a, b, c = (scene.arrive(name) for name in "abc")
    await settle()
    scene.let_go("a", "c")
    await a.over.wait()
    b.stop(RequestCancelled("gone"))
    await c.over.wait()
    assert scene.order[-1] == "c"
    assert scene.turns.doing(KEY).activity is Activity.IDLE


async def test_a_delete_stops_all_that_was_there_and_goes_before_what_comes() -> None:
    scene = Scene()
    early = [scene.arrive(name) for name in "abc"]
    await settle()
    delete = scene.delete()
    late = scene.arrive("late")
    assert await delete.result() == 3
    await settle()
    assert scene.order == ["a", "delete", "late"]
    assert all(isinstance(run.error, AgentDeleted) for run in early)
    assert late.error is None
    scene.let_go("late")


async def test_a_delete_that_fails_has_stopped_nobody() -> None:
    scene = Scene()
    early = [scene.arrive(name) for name in "ab"]
    await settle()

    async def refused(run: Run[None]) -> None:
        async with scene.turns.overtake(KEY, run):
            raise StorageUnavailable("the disk refuses")

    delete: Run[None] = Run("delete")
    delete.start(refused)
    late = scene.arrive("late")
    await delete.over.wait()
    assert isinstance(delete.error, StorageUnavailable)
    scene.let_go("a", "b", "late")
    await late.over.wait()
    assert scene.order == ["a", "b", "late"]
    assert [run.error for run in (*early, late)] == [None, None, None]


async def test_two_deletes_run_one_after_another() -> None:
    scene = Scene()
    holder = scene.arrive("a")
    await settle()
    first, second = scene.delete(), scene.delete()
    assert await first.result() == 1
    assert await second.result() == 0
    assert isinstance(holder.error, AgentDeleted)
    assert scene.order == ["a", "delete", "delete"]


async def test_the_line_is_bounded_and_an_agent_that_is_free_still_runs() -> None:
    scene = Scene(max_waiting=2)
    for name in "abc":
        scene.arrive(name)
    refused = scene.arrive("d")
    free = scene.arrive("e", AgentKey("", "b"))
    await refused.over.wait()
    assert isinstance(refused.error, QueueFull)
    assert refused.error.retry_after == 1.0
    await settle()
    assert scene.order == ["a", "e"]
    assert free.error is None
    scene.let_go(*"abce")


async def test_doing_is_the_holders() -> None:
    scene = Scene()
    run = scene.arrive("a")
    await settle()
    run.doing = Doing(Activity.DECODING, 3, 10)
    assert scene.turns.doing(KEY) == (Activity.DECODING, 3, 10)
    scene.let_go("a")
    await run.over.wait()
    assert scene.turns.lines == 0
