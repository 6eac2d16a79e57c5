"""Only operators operate, and what they did is written down."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from simulator import InteractionResult, Simulator
from tests.bot.running import running
from utils.database import Pool
from utils.operations import slash


async def run(simulator: Simulator, user_id: int, subcommand: str, **where: Any) -> InteractionResult:
    """Run /mirror and wait for its last word."""
    result = await simulator.run_command("mirror", subcommand=subcommand, user_id=user_id, **where)
    return await result.wait_done(30, until=lambda seen: not (seen.final_content or "Syncing").startswith("Syncing"))


async def actions(database: Pool) -> list[tuple[Any, ...]]:
    """Return what is written down, in order."""
    rows = await database.fetch("SELECT user_id, command, arguments, result FROM ops.admin_actions ORDER BY id")
    return [tuple(row) for row in rows]


async def test_the_owner_sees_how_far_the_mirror_has_come(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(database, simulator, monkeypatch):
        result = await run(simulator, simulator.world.operator_id, "status")
    assert (result.deferred, result.ephemeral) == (True, True)
    assert result.final_content is not None
    for words in ("Up to date", "2 guilds available, 2 reconciled", "members 3,540", "roles 18", "Last reconciles"):
        assert words in result.final_content
    assert await actions(database) == [(simulator.world.operator_id, "mirror status", {}, result.final_content)]


async def test_a_sync_writes_what_differs_and_says_how_much(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(slash, "EDIT_SECONDS", 0.0)
    async with running(database, simulator, monkeypatch):
        one, *_ = [id for id in simulator.world.guild(large).ordered_member_ids() if id != simulator.world.bot.id]
        await database.execute("UPDATE members SET nick = 'wrong' WHERE guild_id = $1 AND user_id = $2", large, one)
        simulator.faults.rest_delay(f"GET /guilds/{large}", 0.6, times=1)  # long enough to be seen waiting
        result = await run(simulator, simulator.world.operator_id, "sync", options={"guild": str(large)})
        assert result.final_content is not None
        assert result.final_content.startswith(
            f"Synced Large ({large}): 3,500 members in 4 pages (gateway), 0 new, 1 chan"
        )
        assert any(edit.content.startswith("Syncing Large") for edit in result.edits)
        assert await database.fetchval("SELECT count(*) FROM members WHERE nick = 'wrong'") == 0
    assert await actions(database) == [
        (simulator.world.operator_id, "mirror sync", {"guild": str(large)}, result.final_content)
    ]


async def test_a_sync_without_a_guild_is_one_of_all(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(database, simulator, monkeypatch):
        result = await run(simulator, simulator.world.operator_id, "sync")
    assert (result.final_content or "").startswith("Synced 2 guilds: 3,540 members in 5 pages (gateway and rest)")


async def test_progress_is_edited_in_at_most_every_two_seconds(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    assert slash.EDIT_SECONDS == 2
    monkeypatch.setattr(slash, "EDIT_SECONDS", 3_600.0)
    async with running(database, simulator, monkeypatch):
        simulator.faults.rest_delay(f"GET /guilds/{large}", 1.2, times=1)
        result = await run(simulator, simulator.world.operator_id, "sync", options={"guild": str(large)})
    assert [edit.content.partition(" ")[0] for edit in result.edits] == ["Syncing", "Synced"]


async def test_the_administrator_of_a_guild_is_refused(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    owner = simulator.world.guild(large).owner_id
    async with running(database, simulator, monkeypatch, admin_guild_id=large):
        runs = await database.fetchval("SELECT count(*) FROM sync_runs")
        result = await run(simulator, owner, "sync", guild_id=large)
        assert (result.ephemeral, result.final_content) == (True, slash.REFUSAL)
        assert await database.fetchval("SELECT count(*) FROM sync_runs") == runs
    assert await actions(database) == [(owner, "mirror sync", {"guild": None}, "refused: no operator")]


async def test_whom_the_settings_name_may_operate(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    someone = simulator.world.guild(small).owner_id
    async with running(database, simulator, monkeypatch, admin_user_ids=frozenset((someone,))):
        result = await run(simulator, someone, "status")
    assert "In the database" in (result.final_content or "")


async def test_without_an_admin_guild_the_commands_are_for_direct_messages_alone(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    async with running(database, simulator, monkeypatch):
        contexts = {command["name"]: command["contexts"] for command in simulator.interactions.commands()}
        assert contexts == {"mirror": [1], "cogs": [1], "db": [1], "preferences": [0]}
        with pytest.raises(LookupError, match="no command /mirror is registered for guild"):
            await simulator.run_command("mirror", subcommand="status", user_id=1, guild_id=small)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("Large", "'Large' is no guild id"),
        ("99999999999999999999", "is no guild id"),
        ("123", "the bot is in no guild with the id 123"),
    ],
)
async def test_a_guild_that_is_none_is_one_clear_line(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, given: str, told: str
) -> None:
    async with running(database, simulator, monkeypatch):
        result = await run(simulator, simulator.world.operator_id, "sync", options={"guild": given})
    assert result.final_content is not None
    assert result.final_content.startswith("Failed: ")
    assert told in result.final_content
    assert "\n" not in result.final_content
    assert [row[3] for row in await actions(database)] == [result.final_content]


async def test_a_sync_that_fails_says_why_in_one_line(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    async with running(database, simulator, monkeypatch):
        simulator.world.guild_outage(small)
        result = await run(simulator, simulator.world.operator_id, "sync", options={"guild": str(small)})
    assert (result.final_content or "").startswith("Failed: ")
    assert "\n" not in (result.final_content or "")


async def test_an_unexpected_error_is_told_as_such_and_written_down(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(database, simulator, monkeypatch) as bot:
        monkeypatch.setattr(bot.mirror, "is_ready", lambda: 1 / 0)
        result = await run(simulator, simulator.world.operator_id, "status")
        monkeypatch.undo()
    assert result.final_content == "Failed: an unexpected ZeroDivisionError; the log says more"


async def test_a_command_that_outlives_its_reply_goes_on_and_is_written_down_at_its_end(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(slash, "COMMAND_SECONDS", 0.2)
    async with running(database, simulator, monkeypatch) as bot:
        let_go = asyncio.Event()
        sync = bot.mirror.sync

        async def slow(guild_id: int) -> Any:
            await let_go.wait()
            return await sync(guild_id)

        monkeypatch.setattr(bot.mirror, "sync", slow)
        result = await run(simulator, simulator.world.operator_id, "sync", options={"guild": str(small)})
        assert (result.final_content or "").startswith("Not finished within")
        assert await actions(database) == []
        let_go.set()
        await result.wait_done(30, until=lambda seen: (seen.final_content or "").startswith("Synced"))
        assert [action[3] for action in await actions(database)] == [result.final_content]


async def test_a_command_under_way_ends_with_the_bot(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    async with running(database, simulator, monkeypatch) as bot:
        started, ended = asyncio.Event(), asyncio.Event()

        async def never(guild_id: int) -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        monkeypatch.setattr(bot.mirror, "sync", never)
        await simulator.run_command(
            "mirror", subcommand="sync", user_id=simulator.world.operator_id, options={"guild": str(small)}
        )
        await asyncio.wait_for(started.wait(), 30)
    assert ended.is_set()


async def test_who_left_the_team_no_longer_operates(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def person(id: int, role: str, state: int = 2) -> dict[str, Any]:
        user = {"id": str(id), "username": f"user{id}", "discriminator": "0", "avatar": None, "global_name": None}
        return {"user": user, "membership_state": state, "permissions": ["*"], "role": role, "team_id": "1"}

    async with running(database, simulator, monkeypatch) as bot:
        plain = await bot.http.application_info()
        members = [person(5, "admin"), person(6, "developer"), person(7, "read_only"), person(8, "admin", state=1)]
        team = {"id": "1", "icon": None, "name": "team", "owner_user_id": "4", "members": members}

        async def application_info() -> Any:
            return plain | {"team": team}

        monkeypatch.setattr(bot.http, "application_info", application_info)
        allowed = [id for id in (4, 5, 6, 7, 8, 9) if await bot.operators.includes(id)]
        assert allowed == [4, 5, 6]
        members.clear()
        assert await bot.operators.includes(5), "the team is not asked for at every command"
        monkeypatch.setattr(slash, "TEAM_SECONDS", -1.0)
        assert not await bot.operators.includes(5)


async def test_every_start_takes_the_lease_with_a_higher_epoch(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    holders: list[tuple[str, int]] = []
    for _ in range(2):
        async with running(database, simulator, monkeypatch) as bot:
            row = await database.fetchrow("SELECT holder, epoch FROM ops.leases WHERE shard = 0")
            assert row is not None
            assert row["holder"] == bot.lease.name
            holders.append(tuple(row))
    assert [epoch for _, epoch in holders] == [1, 2]
    assert holders[0][0] != holders[1][0]
