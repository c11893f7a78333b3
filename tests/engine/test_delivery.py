"""Events reach the event loop in the order in which they were sent, whichever way."""

from __future__ import annotations

import asyncio
import itertools
import threading

from warmkv_server.engine.steps.delivery import Delivery


async def test_items_arrive_once_and_in_order_whichever_way_they_are_sent() -> None:
    arrived: list[int] = []
    delivery = Delivery(asyncio.get_running_loop(), arrived.append)
    ways = itertools.cycle([False, False, True, False, True, True, False])

    def send() -> None:
        for number, at_once in zip(range(2000), ways, strict=False):
            delivery.send(number, at_once=at_once)
        delivery.close()

    await asyncio.to_thread(send)
    await asyncio.sleep(0)  # what was on its way when it closed
    assert arrived == list(range(2000))


async def test_what_can_wait_arrives_while_the_sender_waits() -> None:
    here = asyncio.Event()
    delivery: Delivery[str] = Delivery(asyncio.get_running_loop(), lambda _: here.set())
    over = threading.Event()

    def send() -> None:
        delivery.send("token", at_once=False)
        over.wait()

    sender = asyncio.create_task(asyncio.to_thread(send))
    await asyncio.wait_for(here.wait(), 60)
    over.set()
    await sender
    await asyncio.to_thread(delivery.close)
