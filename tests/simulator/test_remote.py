"""The simulator in a separate process, controlled over its control endpoint."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import aiohttp
import pytest

from simulator import World
from simulator.remote import SimulatorProcess


async def test_controls_and_reads_a_simulator_process() -> None:
    async with SimulatorProcess("--seed", "4", "--guild", "300", "--guilds", "3x20", "--no-limits") as simulator:
        here = World(seed=4)
        for members in (300, 20, 20, 20):
            here.add_guild(members=members)
        gid = next(iter(here.guilds))
        assert await simulator.rows("members", gid) == list(here.expected_rows("members", gid))
        assert await simulator.call("random_events", 50, seed=9) == [
            here.random_event(rng) for rng in [random.Random(9)] for _ in range(50)
        ]
        user_id = await simulator.call("world.join", gid)
        until = datetime(2027, 1, 1, tzinfo=UTC)
        await simulator.call("world.update_member", gid, user_id, timed_out_until=until, nick="a\0\ud800")
        row = next(row for row in await simulator.rows("members", gid) if row["user_id"] == user_id)
        assert (row["timed_out_until"], row["nick"]) == (until, "a\ufffd\ufffd")
        await simulator.call("faults.drop_page", gid, "last")
        assert await simulator.call("faults.injected") == {}
        assert await simulator.call("gateway.identifies") == 0
        with pytest.raises(RuntimeError, match="the world has no guild 5"):
            await simulator.call("world.join", 5)
        with pytest.raises(RuntimeError, match=r"unknown name 'os\.system'"):
            await simulator.call("os.system", "true")
        headers = {"Authorization": f"Bot {simulator.token}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(f"{simulator.api_base}/gateway/bot") as response,
        ):
            assert (await response.json())["url"] == simulator.gateway_url


async def test_invalid_command_line_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended before it listened"):
        async with SimulatorProcess("--guilds", "many"):
            pass
