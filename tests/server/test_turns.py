from __future__ import annotations

import asyncio
import random

import pytest

from edgemoe.server.protocols.errors import ApiError
from edgemoe.server.turns import Turns


def test_no_more_run_than_may_and_requests_take_turns() -> None:
    order: list[str] = []
    most = 0

    async def reply(turns: Turns, request: str) -> None:
        nonlocal most
        async with turns.turn(request):
            most = max(most, turns.running)
            order.append(request)
            await asyncio.sleep(0.001)

    async def main() -> Turns:
        turns = Turns(2, 100)
        many = [asyncio.create_task(reply(turns, "many")) for _ in range(20)]
        await asyncio.sleep(0)
        await asyncio.gather(*many, *(reply(turns, name) for name in "abc"))
        return turns

    turns = asyncio.run(main())
    assert most == 2
    # Those that came later wait for two of the twenty at most, each.
    assert all(order.index(name) < 10 for name in "abc")
    assert (turns.running, turns.waiting) == (0, 0)


def test_who_is_cancelled_leaves_no_turn_behind() -> None:
    async def main() -> Turns:
        draw = random.Random(1)
        turns = Turns(3, 100)

        async def reply(request: int) -> None:
            async with turns.turn(request):
                await asyncio.sleep(draw.random() * 0.002)

        for _ in range(60):
            tasks = [asyncio.create_task(reply(number % 4)) for number in range(12)]
            await asyncio.sleep(draw.random() * 0.003)
            for task in draw.sample(tasks, 6):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (turns.running, turns.waiting, turns._free) == (0, 0, 3)
        return turns

    asyncio.run(main())


def test_too_many_requests_are_refused() -> None:
    async def main() -> None:
        turns = Turns(1, 2)
        async with turns.request(), turns.request():
            with pytest.raises(ApiError, match="2 requests are waiting") as caught:
                async with turns.request():
                    pass
            assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})
        async with turns.request():
            assert turns.requests == 1

    asyncio.run(main())
