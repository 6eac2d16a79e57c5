"""Background tasks are ended."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from utils.tasks import cancel_and_wait


async def test_cancels_again_what_went_on_after_an_error() -> None:
    started = asyncio.Event()
    errors: list[str] = []

    async def fails_when_cancelled() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError("the connection is gone") from None

    async def retry() -> None:
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(fails_when_cancelled() if not errors else asyncio.sleep(60))
            except* OSError as error:
                errors.append(str(error.exceptions[0]))

    task = asyncio.create_task(retry())
    await started.wait()
    async with asyncio.timeout(30):
        await cancel_and_wait((task,))
    assert errors == ["the connection is gone"]
    assert task.cancelled()


async def test_leaves_results_and_errors_to_their_tasks() -> None:
    async def fail() -> None:
        raise ValueError("no")

    async def answer() -> int:
        return 42

    failed, answered = asyncio.create_task(fail()), asyncio.create_task(answer())
    await asyncio.wait({failed, answered})
    await cancel_and_wait((failed, answered))
    assert answered.result() == 42
    with pytest.raises(ValueError, match="no"):
        failed.result()


async def test_returns_what_still_runs() -> None:
    async def ignore() -> None:
        while not done.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await done.wait()

    done = asyncio.Event()
    task = asyncio.create_task(ignore())
    await asyncio.sleep(0)
    assert await cancel_and_wait((task,), 0.1) == {task}
    done.set()
    await task
    assert await cancel_and_wait((task,), 0.1) == set()
