"""Operators' slash commands: who may run them, their progress, and the audit log; with /mirror as the example."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from simulator import InteractionResult, Simulator
from simulator.entities import Permission
from tests.bot.running import running_bot
from tests.waiting import until
from utils.database import Pool
from utils.mirror.discord.permissions import invite_url
from utils.operations import slash


async def run(simulator: Simulator, user_id: int, subcommand: str, **where: Any) -> InteractionResult:
    """Run /mirror and wait for its final answer."""
    result = await simulator.run_command("mirror", subcommand=subcommand, user_id=user_id, **where)
    return await result.wait_done(30, until=lambda seen: not (seen.final_content or "Syncing").startswith("Syncing"))


async def audit_log(database: Pool) -> list[tuple[Any, ...]]:
    """Return the audit log, oldest first."""
    rows = await database.fetch("SELECT user_id, command, arguments, result FROM ops.admin_actions ORDER BY id")
    return [tuple(row) for row in rows]


async def test_status_shows_progress_and_row_counts(database: Pool, simulator: Simulator) -> None:
    async with running_bot(database, simulator):
        result = await run(simulator, simulator.world.operator_id, "status")
    assert (result.deferred, result.ephemeral) == (True, True)
    assert result.final_content is not None
    for words in ("Up to date", "2 guilds available, 2 reconciled", "members 3,540", "roles 18", "Last reconciles"):
        assert words in result.final_content
    assert await audit_log(database) == [(simulator.world.operator_id, "mirror status", {}, result.final_content)]


async def test_status_shows_what_each_guild_does_not_grant(database: Pool, simulator: Simulator, small: int) -> None:
    world = simulator.world
    async with running_bot(database, simulator) as bot:
        result = await run(simulator, world.operator_id, "status")
        assert "Missing permissions" not in (result.final_content or "")
        world.grant(small, Permission.VIEW_CHANNEL | Permission.READ_MESSAGE_HISTORY | Permission.BAN_MEMBERS)
        guild = bot.get_guild(small)
        assert guild is not None
        await until(lambda: not guild.me.guild_permissions.manage_threads)
        result = await run(simulator, world.operator_id, "status")
    shown = result.final_content or ""
    assert f"Small ({small}): no Manage Threads (not mirrored: private threads" in shown
    assert invite_url(world.application_id) in shown
    assert shown.count(": no ") == 1


async def test_sync_writes_differences_and_reports_counts(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    async with running_bot(database, simulator) as bot:
        bot.operators.edit_interval = 0.0
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
    assert await audit_log(database) == [
        (simulator.world.operator_id, "mirror sync", {"guild": str(large)}, result.final_content)
    ]


async def test_sync_without_guild_syncs_all(database: Pool, simulator: Simulator) -> None:
    async with running_bot(database, simulator):
        result = await run(simulator, simulator.world.operator_id, "sync")
    assert (result.final_content or "").startswith("Synced 2 guilds: 3,540 members in 5 pages (gateway and rest)")


async def test_progress_edits_are_rate_limited(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    async with running_bot(database, simulator) as bot:
        assert bot.operators.edit_interval == 2
        bot.operators.edit_interval = 3_600.0
        simulator.faults.rest_delay(f"GET /guilds/{large}", 1.2, times=1)
        result = await run(simulator, simulator.world.operator_id, "sync", options={"guild": str(large)})
    assert [edit.content.partition(" ")[0] for edit in result.edits] == ["Syncing", "Synced"]


async def test_refuses_guild_administrators(database: Pool, simulator: Simulator, large: int) -> None:
    owner = simulator.world.guild(large).owner_id
    async with running_bot(database, simulator, admin_guild_id=large):
        runs = await database.fetchval("SELECT count(*) FROM sync_runs")
        result = await run(simulator, owner, "sync", guild_id=large)
        assert (result.ephemeral, result.final_content) == (True, slash.REFUSAL)
        assert await database.fetchval("SELECT count(*) FROM sync_runs") == runs
    assert await audit_log(database) == [(owner, "mirror sync", {"guild": None}, "refused: not an operator")]


async def test_refused_commands_are_recorded_a_few_times_a_minute(
    database: Pool, simulator: Simulator, small: int, caplog: pytest.LogCaptureFixture
) -> None:
    world = simulator.world
    operator, *strangers = [id for id in world.guild(small).ordered_member_ids() if id != world.bot.id]
    caplog.set_level("INFO", "utils.operations.slash")
    settings: dict[str, Any] = {"admin_guild_id": small, "admin_user_ids": frozenset((operator,))}
    async with running_bot(database, simulator, **settings) as bot:
        bot.operators.refusals = slash.Refusals(per_user=2, per_minute=5, interval=0.3)
        for number in range(20):
            result = await run(simulator, strangers[number % 4], "sync", guild_id=small)
            assert (result.ephemeral, result.final_content) == (True, slash.REFUSAL), "everybody is answered"
        rows = await audit_log(database)
        assert len(rows) == 5
        assert all(sum(row[0] == stranger for row in rows) <= 2 for stranger in strangers)
        await until(lambda: sum(getattr(line, "refused", 0) for line in caplog.records) == 15)
        assert "Up to date" in ((await run(simulator, operator, "status", guild_id=small)).final_content or "")
    assert len(await audit_log(database)) == 6, "operators are always recorded"
    assert len([line for line in caplog.records if "not an operator" in line.getMessage()]) == 5


async def test_refusals_of_a_day_leave_room_for_operators(caplog: pytest.LogCaptureFixture) -> None:
    refusals = slash.Refusals(per_day=3, interval=3_600)
    assert [refusals.admits(user) for user in range(6)] == [True, True, True, False, False, False]
    await refusals.stop()
    assert [getattr(line, "refused", 0) for line in caplog.records] == [3]


async def test_unknown_owner_is_asked_for_once_and_recorded_as_a_refusal(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    async with running_bot(database, simulator, admin_guild_id=small) as bot:
        asked = 0

        async def application_info() -> Any:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.2)
            raise OSError("no route to Discord")

        monkeypatch.setattr(bot, "application_info", application_info)
        bot.operators.owners_ttl = -1.0
        bot.operators.refusals = slash.Refusals(per_user=1)
        someone = simulator.world.guild(small).owner_id
        results = await asyncio.gather(*(run(simulator, someone, "status", guild_id=small) for _ in range(5)))
        assert all("cannot ask Discord who owns this application" in (it.final_content or "") for it in results)
        assert asked < 5
        assert len(await audit_log(database)) == 1


async def test_accepts_users_in_admin_user_ids(database: Pool, simulator: Simulator, small: int) -> None:
    someone = simulator.world.guild(small).owner_id
    async with running_bot(database, simulator, admin_user_ids=frozenset((someone,))):
        result = await run(simulator, someone, "status")
    assert "In the database" in (result.final_content or "")


async def test_commands_are_for_direct_messages_without_admin_guild(
    database: Pool, simulator: Simulator, small: int
) -> None:
    async with running_bot(database, simulator):
        contexts = {command["name"]: command["contexts"] for command in simulator.interactions.commands()}
        assert contexts == {"mirror": [1], "cogs": [1], "db": [1], "preferences": [0]}
        with pytest.raises(LookupError, match="no command /mirror is registered for guild"):
            await simulator.run_command("mirror", subcommand="status", user_id=1, guild_id=small)


@pytest.mark.parametrize(
    ("guild", "expected"),
    [
        ("Large", "'Large' is not a guild id"),
        ("99999999999999999999", "is not a guild id"),
        pytest.param("9" * 5_000, "is not a guild id", id="too many digits"),
        ("123", "the bot is not in a guild with the id 123"),
    ],
)
async def test_sync_rejects_unknown_guild_in_one_line(
    database: Pool, simulator: Simulator, guild: str, expected: str
) -> None:
    async with running_bot(database, simulator):
        result = await run(simulator, simulator.world.operator_id, "sync", options={"guild": guild})
    assert result.final_content is not None
    assert result.final_content.startswith("Failed: ")
    assert expected in result.final_content
    assert "\n" not in result.final_content
    assert [row[3] for row in await audit_log(database)] == [result.final_content]


async def test_guild_in_an_outage_is_named_and_left_out(database: Pool, simulator: Simulator, small: int) -> None:
    async with running_bot(database, simulator) as bot:
        simulator.world.guild_outage(small)
        await until(lambda: not bot.mirror.reconciler.guilds[small].available)
        result = await run(simulator, simulator.world.operator_id, "sync", options={"guild": str(small)})
        assert (result.final_content or "").startswith(f"Failed: Small ({small}) is in an outage: ")
        result = await run(simulator, simulator.world.operator_id, "sync")
        assert (result.final_content or "").startswith("Synced 1 guild (1 guild in an outage left out): 3,500 members")
        result = await run(simulator, simulator.world.operator_id, "status")
        assert ": 1 guild available, 1 in an outage, 1 reconciled" in (result.final_content or "")


async def test_failed_sync_is_explained_in_one_line(database: Pool, simulator: Simulator, small: int) -> None:
    async with running_bot(database, simulator):
        simulator.faults.rest_fail(f"GET /guilds/{small}", 403)
        result = await run(simulator, simulator.world.operator_id, "sync", options={"guild": str(small)})
    assert (result.final_content or "").startswith("Failed: ")
    assert "\n" not in (result.final_content or "")


async def test_unexpected_error_shows_type_only_and_is_recorded(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_bot(database, simulator) as bot:
        monkeypatch.setattr(bot.mirror, "is_ready", lambda: 1 / 0)
        result = await run(simulator, simulator.world.operator_id, "status")
        monkeypatch.undo()
    assert result.final_content == "Failed: unexpected ZeroDivisionError, see the log"
    assert [row[3] for row in await audit_log(database)] == [result.final_content]


async def test_command_outlasting_its_reply_is_recorded_at_its_end(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    async with running_bot(database, simulator) as bot:
        bot.operators.reply_timeout = 0.2
        release = asyncio.Event()
        sync = bot.mirror.sync

        async def slow(guild_id: int) -> Any:
            await release.wait()
            return await sync(guild_id)

        monkeypatch.setattr(bot.mirror, "sync", slow)
        result = await run(simulator, simulator.world.operator_id, "sync", options={"guild": str(small)})
        assert (result.final_content or "").startswith("Still running after")
        assert await audit_log(database) == []
        release.set()
        await result.wait_done(30, until=lambda seen: (seen.final_content or "").startswith("Synced"))
        assert [action[3] for action in await audit_log(database)] == [result.final_content]


async def test_stopping_the_bot_cancels_running_commands(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    async with running_bot(database, simulator) as bot:
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
    assert [row[3] for row in await audit_log(database)] == ["Interrupted: the bot was stopped before this was done"]


async def test_former_team_member_is_refused(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def person(id: int, role: str, state: int = 2) -> dict[str, Any]:
        user = {"id": str(id), "username": f"user{id}", "discriminator": "0", "avatar": None, "global_name": None}
        return {"user": user, "membership_state": state, "permissions": ["*"], "role": role, "team_id": "1"}

    async with running_bot(database, simulator) as bot:
        plain = await bot.http.application_info()
        members = [person(5, "admin"), person(6, "developer"), person(7, "read_only"), person(8, "admin", state=1)]
        team = {"id": "1", "icon": None, "name": "team", "owner_user_id": "4", "members": members}

        async def application_info() -> Any:
            return plain | {"team": team}

        monkeypatch.setattr(bot.http, "application_info", application_info)
        allowed = [id for id in (4, 5, 6, 7, 8, 9) if await bot.operators.includes(id)]
        assert allowed == [4, 5, 6]
        members.clear()
        assert await bot.operators.includes(5), "the team is cached"
        bot.operators.owners_ttl = -1.0
        assert not await bot.operators.includes(5)


async def test_each_start_takes_the_lease_with_a_higher_epoch(database: Pool, simulator: Simulator) -> None:
    holders: list[tuple[str, int]] = []
    for _ in range(2):
        async with running_bot(database, simulator) as bot:
            row = await database.fetchrow("SELECT holder, epoch FROM ops.leases WHERE shard = 0")
            assert row is not None
            assert row["holder"] == bot.lease.name
            holders.append(tuple(row))
    epochs = [epoch for _, epoch in holders]
    assert epochs == sorted(set(epochs))
    assert holders[0][0] != holders[1][0]
