"""`python bot.py`: start, signals, and exit codes."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from simulator import Simulator
from simulator.proxy import Proxy
from tests.bot.running import BotProcess, mirror_differences, run_cli, wait_until_mirrored
from tests.waiting import until
from utils.database import Connection, ConnectTarget, Pool
from utils.database.embedded import PORT, EmbeddedServer

pytestmark = pytest.mark.slow


def discord_settings(simulator: Simulator, **settings: str) -> dict[str, str]:
    return {"DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base, **settings}


async def rows_waiting(bot: BotProcess) -> int:
    return int((await bot.get("/readyz"))[1]["rows_waiting"])


async def is_unready(bot: BotProcess) -> bool:
    """Return whether GET /readyz says, in status and body, that the database cannot be used."""
    status, state = await bot.get("/readyz")
    return (status, state["ok"], state["database"]) == (503, False, False)


async def is_blocked(connection: Connection) -> bool:
    query = "SELECT EXISTS (SELECT FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database"
    return bool(await connection.fetchval(f"{query} WHERE NOT l.granted AND d.datname = current_database())"))


async def test_start_mirrors_every_guild(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str
) -> None:
    async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=database_url)) as bot:
        await bot.wait_until_ready()
        assert (await bot.get("/healthz"))[0] == 200
        status, state = await bot.get("/readyz")
        assert (status, state["available"], state["reconciled"], state["database"]) == (200, 2, 2, True)
        assert "guildbook_loop_stall_max_seconds" in (await bot.get("/metrics"))[1]
        await wait_until_mirrored(database, simulator)
        bot.send_signal(signal.SIGTERM)
        assert await bot.wait_for_exit() == 0
    assert simulator.token not in bot.output


async def test_sigterm_writes_buffered_rows_and_exits_with_0(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    async with BotProcess(
        tmp_path, **discord_settings(simulator, DATABASE_URL=database_url, FLUSH_SECONDS="3600")
    ) as bot:
        await bot.wait_until_ready()
        await wait_until_mirrored(database, simulator)
        before = await database.fetchval("SELECT count(*) FROM members WHERE guild_id = $1", small)
        waiting = await rows_waiting(bot)
        joined = [simulator.world.join(small) for _ in range(5)]

        async def are_buffered() -> bool:
            return await rows_waiting(bot) >= waiting + 2 * len(joined)  # a user and a member each

        await until(are_buffered)
        assert await database.fetchval("SELECT count(*) FROM members WHERE guild_id = $1", small) == before
        bot.send_signal(signal.SIGTERM)
        assert await bot.wait_for_exit() == 0
    assert await database.fetchval("SELECT count(*) FROM members WHERE user_id = ANY($1)", joined) == len(joined)
    assert await mirror_differences(database, simulator) == []


async def test_ctrl_c_exits_with_0(tmp_path: Path, simulator: Simulator, database_url: str) -> None:
    async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=database_url)) as bot:
        await bot.wait_until_ready()
        bot.send_signal(signal.SIGINT)
        assert await bot.wait_for_exit() == 0
    assert "Traceback" not in bot.output


async def test_second_signal_hurries_a_blocked_shutdown(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    settings = discord_settings(simulator, DATABASE_URL=database_url, SHUTDOWN_SECONDS="3600", FLUSH_SECONDS="0.1")
    async with BotProcess(tmp_path, **settings) as bot:
        await bot.wait_until_ready()
        async with database.transaction() as connection:
            await connection.execute("LOCK TABLE users, members IN ACCESS EXCLUSIVE MODE")
            simulator.world.join(small)
            await until(lambda: is_blocked(connection))
            bot.send_signal(signal.SIGTERM)
            await bot.wait_for_output("received SIGTERM: stopping")
            bot.send_signal(signal.SIGTERM)
            assert await bot.wait_for_exit() == 0
    assert "2 rows" in bot.output, "lost rows are reported"


async def test_killed_bot_finds_its_embedded_server_again(tmp_path: Path, simulator: Simulator, small: int) -> None:
    settings = discord_settings(simulator, DATA_DIR=str(tmp_path / "data"))
    server = EmbeddedServer(tmp_path / "data")
    lock_file = server.cluster / "postmaster.pid"
    async with BotProcess(tmp_path, **settings) as first:
        await first.wait_until_ready()
        metrics = (await first.get("/metrics"))[1]
        former = float(re.findall(r"^guildbook_lease_epoch (.+)$", metrics, re.MULTILINE)[0])
        first.send_signal(signal.SIGKILL)
        await first.wait_for_exit()
    postmaster = lock_file.read_text().split()[0]
    left, joined = simulator.world.guild(small).ordered_member_ids()[0], simulator.world.join(small)
    if left != simulator.world.bot.id:
        simulator.world.leave(small, left)
    async with BotProcess(tmp_path, **settings) as second:
        await second.wait_until_ready()
        assert lock_file.read_text().split()[0] == postmaster
        await server.start()
        database = Pool(server.target(), pool_max=2)
        await database.connect()
        try:
            await wait_until_mirrored(database, simulator)
            assert await database.fetchval("SELECT count(*) FROM members WHERE user_id = $1", joined) == 1
            assert await database.fetchval("SELECT epoch FROM ops.leases") > former
        finally:
            await database.close()
        second.send_signal(signal.SIGTERM)
        assert await second.wait_for_exit() == 0
    assert not lock_file.exists(), "the last process stops the server"


async def test_missing_token_is_one_line_with_advice(tmp_path: Path) -> None:
    async with BotProcess(tmp_path) as bot:
        assert await bot.wait_for_exit() == 2
    assert bot.output.count("\n") == 1
    for word in ("DISCORD_TOKEN", "https://discord.com/developers/applications", "Reset Token", "make demo"):
        assert word in bot.output


async def test_each_invalid_setting_gets_a_line(tmp_path: Path) -> None:
    async with BotProcess(tmp_path, DISCORD_API_BASE="discord", DB_POOL_MAX="many", DISCORD_TOKEN="a b") as bot:
        assert await bot.wait_for_exit() == 2
    assert [line.partition(":")[0] for line in bot.output.splitlines()] == [
        "DISCORD_TOKEN",
        "DISCORD_API_BASE",
        "DB_POOL_MAX",
    ]
    assert "a b" not in bot.output


async def test_wrong_token_is_one_line(tmp_path: Path, simulator: Simulator, database_url: str) -> None:
    token = "an-unknown-token"
    async with BotProcess(
        tmp_path, **discord_settings(simulator, DISCORD_TOKEN=token, DATABASE_URL=database_url, LOG_LEVEL="ERROR")
    ) as bot:
        assert await bot.wait_for_exit() == 2
    assert bot.output.count("\n") == 1
    assert bot.output.startswith("DISCORD_TOKEN: ")
    assert token not in bot.output


async def test_missing_intent_is_one_line_that_names_it(
    tmp_path: Path, simulator: Simulator, database_url: str
) -> None:
    simulator.privileged_intents = 0
    async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=database_url, LOG_LEVEL="ERROR")) as bot:
        assert await bot.wait_for_exit() == 2
    assert bot.output.count("\n") == 1
    assert "Server Members Intent" in bot.output
    assert "Privileged Gateway Intents" in bot.output


async def test_failing_discord_is_one_line_and_exit_code_1(
    tmp_path: Path, simulator: Simulator, database_url: str
) -> None:
    simulator.faults.rest_fail("GET /users/@me", status=403, times=100)
    async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=database_url, LOG_LEVEL="ERROR")) as bot:
        assert await bot.wait_for_exit() == 1
    assert bot.output.count("\n") == 1
    assert simulator.api_base in bot.output


async def test_unreachable_discord_is_one_line_and_exit_code_1(
    tmp_path: Path, simulator: Simulator, database_url: str
) -> None:
    unreachable = "http://127.0.0.1:9/api/v10"
    settings = discord_settings(simulator, DATABASE_URL=database_url, DISCORD_API_BASE=unreachable, LOG_LEVEL="ERROR")
    async with BotProcess(tmp_path, **settings) as bot:
        assert await bot.wait_for_exit() == 1
    assert bot.output.count("\n") == 1
    assert unreachable in bot.output


async def test_unreachable_database_is_one_line_and_exit_code_1(tmp_path: Path, simulator: Simulator) -> None:
    url = f"postgresql://someone:a-password@/nothing?host={tmp_path}"
    settings = discord_settings(simulator, DATABASE_URL=url, DB_CONNECT_TIMEOUT="0.5", LOG_LEVEL="ERROR")
    async with BotProcess(tmp_path, **settings) as bot:
        assert await bot.wait_for_exit() == 1
    assert bot.output.count("\n") == 1
    assert "DB_CONNECT_TIMEOUT" in bot.output
    assert "a-password" not in bot.output


async def test_signal_stops_a_start_that_waits_for_the_database(tmp_path: Path, simulator: Simulator) -> None:
    url = f"postgresql://someone@/nothing?host={tmp_path}"
    async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=url, DB_CONNECT_TIMEOUT="3600")) as bot:
        await bot.wait_for_output("waiting for the database")
        bot.send_signal(signal.SIGTERM)
        assert await bot.wait_for_exit() == 0


async def test_taken_health_port_is_one_line_and_exit_code_2(
    tmp_path: Path, simulator: Simulator, database_url: str
) -> None:
    port = simulator.base_url.rpartition(":")[2]
    settings = discord_settings(simulator, DATABASE_URL=database_url, HEALTH_PORT=port, LOG_LEVEL="ERROR")
    async with BotProcess(tmp_path, **settings) as bot:
        assert await bot.wait_for_exit() == 2
    assert bot.output.count("\n") == 1
    assert port in bot.output


async def test_outdated_schema_without_auto_migrate_exits_with_1(
    tmp_path: Path, simulator: Simulator, empty_target: ConnectTarget
) -> None:
    settings = discord_settings(
        simulator, DATABASE_URL=empty_target.libpq_url(), AUTO_MIGRATE="false", LOG_LEVEL="ERROR"
    )
    async with BotProcess(tmp_path, **settings) as bot:
        assert await bot.wait_for_exit() == 1
    assert bot.output.count("\n") == 1
    assert "db upgrade" in bot.output


async def test_bot_survives_a_gateway_reconnect(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=database_url)) as bot:
        await bot.wait_until_ready()
        simulator.faults.refuse_resume()
        simulator.faults.drop_socket()
        simulator.world.join(small)
        await until(lambda: simulator.faults.injected["refuse_resume"] or bot.process.returncode is not None)
        await wait_until_mirrored(database, simulator)
        bot.send_signal(signal.SIGTERM)
        assert await bot.wait_for_exit() == 0


async def test_another_applications_token_is_refused_with_a_line_that_says_what_to_do(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str
) -> None:
    await database.execute("INSERT INTO ops.application (id) VALUES (42)")
    async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=database_url, LOG_LEVEL="ERROR")) as bot:
        assert await bot.wait_for_exit() == 2
    assert bot.output.count("\n") == 1
    assert bot.output.startswith("DISCORD_TOKEN: the database belongs to application 42,")
    command = f"python bot.py db adopt {simulator.world.application_id}"
    assert command in bot.output
    assert simulator.gateway.identifies == 0
    assert await database.fetchval("SELECT count(*) FROM guilds") == 0
    code, output = await run_cli(tmp_path, *command.split()[2:], DATABASE_URL=database_url)
    assert code == 2, output
    assert output == "guilds that the application is not in will count as left: confirm with --yes\n"
    code, output = await run_cli(tmp_path, *command.split()[2:], "--yes", DATABASE_URL=database_url)
    assert code == 0, output
    assert await database.fetchval("SELECT count(*) FROM ops.admin_actions WHERE command = 'db adopt'") == 1
    async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=database_url)) as bot:
        await bot.wait_until_ready()
        bot.send_signal(signal.SIGTERM)
        assert await bot.wait_for_exit() == 0


async def test_a_changed_token_of_the_same_application_is_accepted(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str
) -> None:
    for token in (simulator.token, "another.token.of-it"):
        simulator.token = token
        async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=database_url)) as bot:
            await bot.wait_until_ready()
            assert await database.fetchval("SELECT id FROM ops.application") == simulator.world.application_id
            bot.send_signal(signal.SIGTERM)
            assert await bot.wait_for_exit() == 0


async def test_not_ready_while_the_database_is_unusable(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str
) -> None:
    async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=database_url)) as bot:
        await bot.wait_until_ready()
        async with database.transaction() as connection:
            await connection.execute("LOCK TABLE ops.leases IN ACCESS EXCLUSIVE MODE")

            await until(lambda: is_unready(bot))
        await bot.wait_until_ready()


async def test_not_ready_while_the_database_does_not_answer(
    tmp_path: Path, simulator: Simulator, database: Pool, server: EmbeddedServer
) -> None:
    target = database.target
    async with Proxy(f"{server.target().hosts[0]}/.s.PGSQL.{PORT}") as proxy:
        url = f"postgresql://{target.user}@127.0.0.1:{proxy.port}/{target.database}?sslmode=disable"
        async with BotProcess(tmp_path, **discord_settings(simulator, DATABASE_URL=url)) as bot:
            await bot.wait_until_ready()
            proxy.freeze()  # a half-open connection: nothing is refused, nothing answers
            await until(lambda: is_unready(bot))
            assert (await bot.get("/healthz"))[0] == 200
            proxy.heal()
            await bot.wait_until_ready()
