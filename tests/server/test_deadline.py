"""A bounded wait that passes every cancellation on."""

from __future__ import annotations

import asyncio

import pytest

from edgemoe.server.deadline import within


def test_a_cancellation_that_comes_as_the_work_ends_is_not_lost() -> None:
    async def main() -> None:
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(within(5, work))
        await asyncio.sleep(0)
        work.set_result(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_cancellation_at_any_step_of_the_work_is_not_lost() -> None:
    async def work() -> int:
        for _ in range(3):
            await asyncio.sleep(0)
        return 1

    async def main(steps: int) -> bool:
        task = asyncio.create_task(within(5, work()))
        for _ in range(steps):
            await asyncio.sleep(0)
        if not task.cancel():
            return True
        with pytest.raises(asyncio.CancelledError):
            await task
        return False

    ended = [asyncio.run(main(steps)) for steps in range(1, 12)]
    assert not ended[0]
    assert ended[-1]


def test_work_that_takes_too_long_is_cancelled() -> None:
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, work())

    asyncio.run(main())
    assert cancelled == [True]


def test_results_and_errors_pass() -> None:
    async def fails() -> None:
        raise ValueError("no")

    async def main() -> int:
        with pytest.raises(ValueError, match="no"):
            await within(None, fails())
        return await within(None, asyncio.sleep(0, 7))

    assert asyncio.run(main()) == 7
