"""Loaded contexts wait for room, in order of arrival."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmkv_server.agents.admission import Admission
from warmkv_server.contract.fairness import Bound, Tenants
from warmkv_server.errors import QueueFull


class Scene:
    def __init__(self, budget: int, max_waiting: int = 100, tenants: int = 1) -> None:
        self.admission = Admission(budget, Bound(max_waiting, Tenants(tenants)))
        self.inside: list[int] = []
        self._leave: dict[int, asyncio.Event] = {}
        self._next = 0

    def arrive(self, nbytes: int, tenant: str = "") -> tuple[int, asyncio.Task[None]]:
        self._next += 1
        number, leave = self._next, asyncio.Event()
        self._leave[number] = leave

        async def work() -> None:
            async with self.admission.hold(nbytes, tenant):
                self.inside.append(number)
                try:
                    await leave.wait()
                finally:
                    self.inside.remove(number)

        return number, asyncio.create_task(work())

    def leave(self, number: int) -> None:
        self._leave[number].set()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_those_that_fit_are_in_and_the_next_waits_its_turn() -> None:
    scene = Scene(budget=10)
    first, _ = scene.arrive(6)
    scene.arrive(4)
    big, _ = scene.arrive(5)
    small, _ = scene.arrive(1)  # would fit, once one byte is free; it doesn't overtake
    await settle()
    assert scene.inside == [1, 2]
    assert scene.admission.waiting == 2
    scene.leave(first)
    await settle()
    assert scene.inside == [2, big, small]


async def test_one_alone_is_let_in_whatever_its_size() -> None:
    scene = Scene(budget=10)
    huge, _ = scene.arrive(1000)
    after, _ = scene.arrive(0)
    await settle()
    assert scene.inside == [huge]
    scene.leave(huge)
    await settle()
    assert scene.inside == [after]


async def test_tenants_take_turns_and_each_keeps_its_order() -> None:
    scene = Scene(budget=1)
    order = [scene.arrive(1, tenant)[0] for tenant in ("red", "red", "red", "red", "blue", "blue", "green")]
    await settle()
    seen = []
    while scene.inside:
        seen += scene.inside
        scene.leave(seen[-1])
        await settle()
    red, blue, green = order[:4], order[4:6], order[6]
    assert seen == [red[0], red[1], blue[0], green, red[2], blue[1], red[3]]


async def test_a_tenant_below_its_share_of_a_full_line_is_let_in() -> None:
    scene = Scene(budget=1, max_waiting=4, tenants=2)
    scene.arrive(1, "red")
    waiting = [scene.arrive(1, "red") for _ in range(4)]
    waiting += [scene.arrive(1, "blue") for _ in range(2)]
    refused = [scene.arrive(1, tenant)[1] for tenant in ("red", "blue")]
    for task in refused:
        with pytest.raises(QueueFull):
            await task
    assert scene.admission.waiting == len(waiting)


async def test_a_tenant_that_holds_all_leaves_another_its_share() -> None:
    scene = Scene(budget=10)
    reds = [scene.arrive(2, "red")[0] for _ in range(7)]
    await settle()
    assert scene.inside == reds[:5]
    blues = [scene.arrive(2, "blue")[0] for _ in range(3)]
    await settle()
    assert scene.inside == [*reds[:5], *blues[:2]]
    for number in reds[:4]:  # what is freed goes to the one that holds less, until both hold as much
        scene.leave(number)
        await settle()
    assert sorted(scene.inside) == [reds[4], reds[5], *blues]


async def test_what_does_not_fit_holds_up_no_other_tenant_and_gets_its_room() -> None:
    scene = Scene(budget=12)
    reds = [scene.arrive(3, "red")[0] for _ in range(4)]
    large, _ = scene.arrive(11, "blue")
    green, _ = scene.arrive(2, "green")
    await settle()
    assert scene.inside == [*reds, green]
    for _ in range(8):
        scene.arrive(1, "red")
    for number in reds[:3]:
        assert large not in scene.inside
        scene.leave(number)
        await settle()
    assert large in scene.inside  # red has no more than its share


@given(st.lists(st.tuples(st.sampled_from(["red", "blue", "green", "leave"]), st.integers(1, 12)), max_size=40))
def test_tenants_have_their_share_at_once_and_twice_the_budget_at_most(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        scene = Scene(budget=12)
        sizes: dict[int, tuple[str, int]] = {}
        for action, value in steps:
            if action != "leave":
                number, _ = scene.arrive(value, action)
                sizes[number] = action, value
            elif scene.inside:
                scene.leave(scene.inside[value % len(scene.inside)])
            await settle()
            held = [sizes[number] for number in scene.inside]
            assert len(held) <= 1 or sum(size for _, size in held) <= 24
        for _ in sizes:
            for number in list(scene.inside):
                scene.leave(number)
            await settle()
        assert scene.admission.waiting == 0
        assert scene.inside == []

    asyncio.run(play())


async def test_too_many_waiting_are_refused() -> None:
    scene = Scene(budget=1, max_waiting=1)
    scene.arrive(1)
    scene.arrive(1)
    await settle()
    with pytest.raises(QueueFull):
        await scene.arrive(1)[1]


@given(st.lists(st.tuples(st.sampled_from(["arrive", "leave", "give up"]), st.integers(0, 12)), max_size=40))
def test_the_budget_holds_and_nobody_is_forgotten(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        scene = Scene(budget=10)
        tasks: dict[int, asyncio.Task[None]] = {}
        sizes: dict[int, int] = {}
        for action, value in steps:
            if action == "arrive":
                number, task = scene.arrive(value)
                tasks[number], sizes[number] = task, value
            elif tasks:
                number = sorted(tasks)[value % len(tasks)]
                if action == "leave":
                    scene.leave(number)
                    tasks.pop(number)
                else:
                    tasks.pop(number).cancel()
            if value % 2:  # sometimes several steps happen before anybody runs
                await settle()
                held = [sizes[number] for number in scene.inside]
                assert len(held) <= 1 or sum(held) <= 10
        for number in list(sizes):
            scene.leave(number)
        for task in tasks.values():
            with suppress(asyncio.CancelledError):
                await asyncio.wait_for(task, 60)
        await settle()
        assert scene.inside == []
        assert scene.admission.waiting == 0
        async with asyncio.timeout(60), scene.admission.hold(10, ""):
            pass

    asyncio.run(play())
