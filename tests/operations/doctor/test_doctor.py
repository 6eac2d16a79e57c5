"""`python bot.py doctor`: each problem is reported with what to do, and affects no other check."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogs.db import BotContext
from simulator import Limits, Simulator, World
from simulator.entities import Permission
from simulator.state import Intent
from tests.bot.running import BotProcess, run_cli, running_bot
from tests.operations.backup.helpers import connect
from tests.operations.migrations.support import HEAD, KNOWN
from tests.packs.support import write_pack
from tests.ports import free_port
from utils.database import ConnectTarget, Pool
from utils.mirror.discord.permissions import invite_url
from utils.operations import migrations
from utils.operations.doctor import CHECKS, Check, CheckSkipped, DoctorContext, Finding, run_checks, summarize_findings
from utils.operations.doctor.configuration import DRAINING, find_token_problem
from utils.operations.doctor.discord import check_discord
from utils.operations.doctor.machine import check_disk
from utils.service.health import HealthServer
from utils.settings import application_of_token, variables

WORST = ("fail", "warn", "ok")
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "migrations.md"
TOKEN = base64.b64encode(b"80351110224678912").decode().rstrip("=") + ".GabcdE.s3cr3t-signature_of_a_token"


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """Discord with one small guild."""
    world = World(seed=11)
    world.add_guild(members=5, name="Small")
    async with Simulator(world, limits=Limits.none()) as running:
        yield running


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the environment of the test run."""
    for name in (*variables(), "PGSERVICE", "PGHOSTADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


async def worst_findings(monkeypatch: pytest.MonkeyPatch, *names: str, **settings: str) -> dict[str, Finding]:
    """Run the named checks, or all, with these settings; return the worst finding of each name."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    checks = [check for check in CHECKS if not names or check.name in names]
    worst: dict[str, Finding] = {}
    for finding in await run_checks(DoctorContext(env_file=".env", environ=settings), checks):
        if finding.name not in worst or WORST.index(finding.state) < WORST.index(worst[finding.name].state):
            worst[finding.name] = finding
    return worst


def test_the_documentation_lists_every_check() -> None:
    rows = PAGE.read_text(encoding="utf-8").partition("\n## The doctor\n")[2].splitlines()
    listed = {
        name for row in rows if row.startswith("| ") for name in row.split(" | ")[0].removeprefix("| ").split(", ")
    }
    assert {check.name for check in CHECKS} <= listed


async def test_finds_no_problem_on_a_healthy_database(
    monkeypatch: pytest.MonkeyPatch, database: Pool, database_url: str, simulator: Simulator
) -> None:
    settings = {"DATABASE_URL": database_url, "DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base}
    findings = await worst_findings(monkeypatch, **settings)
    problems = {name for name, finding in findings.items() if finding.state != "ok"}
    assert problems <= {"token", "backups"}, findings  # the simulator's token does not have a real one's format
    row = await database.fetchrow("SELECT command, result FROM ops.admin_actions")
    assert row is not None
    assert row["command"] == "doctor"
    assert "0 fail" in row["result"]


async def test_crashing_and_hanging_checks_affect_no_others() -> None:
    async def works(context: DoctorContext) -> Sequence[Finding]:
        return [Finding("ok", "works", "fine")]

    async def crashes(context: DoctorContext) -> Sequence[Finding]:
        raise ZeroDivisionError("by zero")

    async def hangs(context: DoctorContext) -> Sequence[Finding]:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling() > 1:  # type: ignore[union-attr]
                    raise

    async def skips(context: DoctorContext) -> Sequence[Finding]:
        raise CheckSkipped("nothing is there")

    checks = [
        Check("crashes", crashes, 5),
        Check("hangs", hangs, 0.05),
        Check("works", works, 5),
        Check("skips", skips, 5),
    ]
    async with asyncio.timeout(10):
        lines = [finding.line for finding in await run_checks(DoctorContext(env_file=None), checks)]
    assert lines == [
        "fail  crashes: the check itself failed: ZeroDivisionError: by zero; please report this line",
        "fail  hangs: no answer within 0.05 s; what it asks does not respond: check that first",
        "ok    works: fine",
        "warn  skips: not checked: nothing is there",
    ]
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


def test_a_summary_begins_with_what_is_wrong() -> None:
    findings = [
        Finding("ok", "a", "fine"),
        Finding("warn", "b", "so so", "look"),
        Finding("ok", "c", "fine"),
        Finding("fail", "a", "broken", "mend it"),
    ]
    outcome = summarize_findings(findings)
    assert outcome.text.splitlines() == ["fail  a: broken; mend it", "warn  b: so so; look", "ok    c"]
    assert not outcome.ok
    assert outcome.file == ("health.txt", "\n".join(finding.line for finding in findings))
    assert summarize_findings(findings[:1]).ok


async def test_invalid_settings_skip_only_their_own_checks(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    settings = {"DB_POOL_MAX": "many", "FLUSH_ROWS": "-1", "DATABASE_URL": database_url}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    findings = await run_checks(DoctorContext(env_file=None, environ=settings), CHECKS)
    errors = [finding.seen for finding in findings if finding.name == "settings"]
    assert [line.partition(":")[0] for line in errors] == ["DB_POOL_MAX", "FLUSH_ROWS"]
    states = {finding.name: finding.state for finding in findings}
    assert (states["database"], states["schema"], states["connections"]) == ("ok", "ok", "warn")


async def test_suggests_names_for_misspelt_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DISCORD_TOKE=s3cr3t\nUNRELATED=1\nDB_POOL_SIZE=3\n")
    findings = await run_checks(
        DoctorContext(environ={"LOG_LEVL": "x", "PGHOSTADDR": "1", "PGDATA": "/", "RAILWAY_TOKEN": "1", "HOME": "/"}),
        [check for check in CHECKS if check.name == "variables"],
    )
    assert {(f.seen.split()[0], f.todo) for f in findings} == {
        ("LOG_LEVL", "did you mean LOG_LEVEL?"),
        ("DISCORD_TOKE", "did you mean DISCORD_TOKEN?"),
        ("DB_POOL_SIZE", "did you mean DB_POOL_MIN?"),
    }
    assert "s3cr3t" not in str(findings)


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (TOKEN, None),
        ("a.b", "three parts"),
        ("x" * 32, "client secret"),
        (base64.b64encode(b"hello").decode() + ".b.c", "application's id"),
        ("!!!.b.c", "application's id"),
        ("ü.b.c", "application's id"),
    ],
)
def test_recognizes_the_format_of_a_token(token: str, expected: str | None) -> None:
    problem = find_token_problem(token)
    assert problem is None if expected is None else problem is not None and expected in problem


@given(st.text())
def test_never_shows_the_token(token: str) -> None:
    problem = find_token_problem(token)
    assert problem is None or len(token) < 12 or token not in problem


async def test_reports_a_rejected_token_and_a_missing_intent(
    monkeypatch: pytest.MonkeyPatch, simulator: Simulator
) -> None:
    base = simulator.api_base
    findings = await worst_findings(monkeypatch, "discord", DISCORD_TOKEN=TOKEN, DISCORD_API_BASE=base)
    assert (findings["discord"].state, findings["discord"].seen) == ("fail", "it does not accept this token")
    simulator.privileged_intents &= ~Intent.GUILD_MEMBERS
    findings = await worst_findings(monkeypatch, "discord", DISCORD_TOKEN=simulator.token, DISCORD_API_BASE=base)
    assert (findings["discord"].state, findings["intents"].state) == ("ok", "fail")
    assert "Privileged Gateway Intents" in findings["intents"].todo


PRESENCES_OFF = "Presence Intent is off, and asked for by INTENTS: cogs that declare it are not loaded"


async def test_reports_a_missing_intent_of_the_settings(monkeypatch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    settings = {
        "DISCORD_TOKEN": simulator.token,
        "DISCORD_API_BASE": simulator.api_base,
        "INTENTS": "presences,invites",
    }
    assert (await worst_findings(monkeypatch, "discord", **settings))["intents"].state == "ok"
    simulator.privileged_intents = int(Intent.GUILD_MEMBERS)
    finding = (await worst_findings(monkeypatch, "discord", **settings))["intents"]
    assert (finding.state, finding.seen) == ("warn", PRESENCES_OFF)
    assert "10,000 users" in finding.todo


async def test_reports_unreachable_and_silent_discord(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = await worst_findings(monkeypatch, "discord", DISCORD_TOKEN=TOKEN, DISCORD_API_BASE="http://127.0.0.1:9")
    assert "cannot be reached" in findings["discord"].seen

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("DISCORD_API_BASE", f"http://127.0.0.1:{port}")
    (finding,) = await check_discord(DoctorContext(env_file=None), timeout=0.05)
    server.close()
    assert "no answer in time" in finding.seen
    assert "s3cr3t" not in f"{findings} {finding}"


async def test_names_the_guilds_that_lack_permissions(monkeypatch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    world = simulator.world
    for number in range(250):  # more than one page
        world.add_guild(members=2, roles=1, channels=0, name=f"Guild {number}")
    names = {"DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base}
    findings = await worst_findings(monkeypatch, "permissions", **names)
    assert (findings["permissions"].state, findings["permissions"].seen) == ("ok", "nothing is missing in 251 guilds")
    last = max(world.guild_ids())
    world.grant(last, Permission.VIEW_CHANNEL | Permission.READ_MESSAGE_HISTORY | Permission.MANAGE_THREADS)
    findings = await worst_findings(monkeypatch, "permissions", **names)
    found = findings["permissions"]
    assert found.state == "warn"
    assert f"({last}) lacks View Audit Log: bans and unbans are not mirrored" in found.seen
    assert invite_url(world.application_id) in found.todo
    for guild_id in world.guild_ids():
        world.grant(guild_id, 0)
    shown = await run_checks(DoctorContext(env_file=None), [c for c in CHECKS if c.name == "permissions"])
    assert len(shown) == 41
    assert shown[-1].seen == "241 more of 251 guilds lack permissions"
    monkeypatch.setenv("DISCORD_TOKEN", "wrong")
    (skipped,) = await run_checks(DoctorContext(env_file=None), [c for c in CHECKS if c.name == "permissions"])
    assert skipped.seen == "not checked: Discord does not accept the token"


async def test_unreachable_database_is_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = await worst_findings(
        monkeypatch, "database", "schema", "rights", DATABASE_URL="postgresql://amy:s3cr3t@127.0.0.1:9/guilds"
    )
    assert {name: finding.state for name, finding in findings.items()} == {
        "database": "fail", "rights": "warn", "schema": "warn",
    }  # fmt: skip
    assert "DATABASE_URL" in findings["database"].seen
    assert findings["database"].todo
    assert "s3cr3t" not in str(findings)


async def test_reports_the_state_of_the_schema(monkeypatch: pytest.MonkeyPatch, empty_target: ConnectTarget) -> None:
    url = empty_target.libpq_url()
    findings = await worst_findings(monkeypatch, "schema", DATABASE_URL=url)
    assert (findings["schema"].state, findings["schema"].seen) == ("warn", "the database has no schema")
    await migrations.upgrade(empty_target, KNOWN[0])
    findings = await worst_findings(monkeypatch, "schema", DATABASE_URL=url, AUTO_MIGRATE="false")
    assert (findings["schema"].state, findings["schema"].todo) == ("fail", "run python bot.py db upgrade")
    await migrations.pause_auto_migrate(empty_target, KNOWN[0])
    findings = await worst_findings(monkeypatch, "schema", DATABASE_URL=url, AUTO_MIGRATE="true")
    assert (findings["schema"].state, findings["AUTO_MIGRATE"].state) == ("fail", "warn")
    await migrations.upgrade(empty_target)
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    await conn.execute("ALTER TABLE roles ADD COLUMN surprise text")
    findings = await worst_findings(monkeypatch, "schema", DATABASE_URL=url)
    assert (findings["schema"].state, findings["drift"].state) == ("ok", "fail")
    await conn.execute("UPDATE guildbook_version SET version_num = '9999'")
    findings = await worst_findings(monkeypatch, "schema", DATABASE_URL=url)
    assert "this version does not know" in findings["schema"].seen
    assert HEAD != "9999"
    await conn.execute("UPDATE guildbook_version SET version_num = $1", HEAD)
    await conn.execute("DROP SCHEMA ops CASCADE")
    await conn.close()
    found = (await worst_findings(monkeypatch, "schema", DATABASE_URL=url))["schema"]
    assert "(schema public: no ops.leases)" in found.seen
    assert (found.state, found.todo) == ("fail", "")


async def test_reports_missing_privileges_and_connections(
    monkeypatch: pytest.MonkeyPatch, empty_target: ConnectTarget
) -> None:
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    await conn.execute("DROP ROLE IF EXISTS doctor_guest; CREATE ROLE doctor_guest LOGIN CONNECTION LIMIT 12")
    await conn.execute("REVOKE TEMPORARY ON DATABASE " + str(empty_target.database) + " FROM PUBLIC")
    url = empty_target.libpq_url().replace("postgres@", "doctor_guest@")
    for name, value in {"DATABASE_URL": url, "DB_POOL_MAX": "10"}.items():
        monkeypatch.setenv(name, value)
    checks = [check for check in CHECKS if check.name in ("rights", "connections")]
    findings = await run_checks(DoctorContext(env_file=None), checks)
    rights = [finding for finding in findings if finding.name == "rights"]
    assert [finding.state for finding in rights] == ["fail", "fail", "fail"]
    assert 'GRANT CREATE ON SCHEMA public TO "doctor_guest"' in rights[1].todo
    assert [(f.state, "DB_POOL_MAX (10)" in f.todo) for f in findings if f.name == "connections"] == [("fail", True)]
    await conn.execute("DROP OWNED BY doctor_guest; DROP ROLE doctor_guest")
    await conn.close()


async def test_reports_a_database_that_was_made_read_only(
    monkeypatch: pytest.MonkeyPatch, empty_target: ConnectTarget
) -> None:
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    await conn.execute(f"ALTER DATABASE {empty_target.database} SET default_transaction_read_only = on")
    await conn.close()
    findings = await worst_findings(monkeypatch, "database", DATABASE_URL=empty_target.libpq_url())
    assert findings["database"].state == "fail"
    assert "default_transaction_read_only is on (set by: database)" in findings["database"].seen


@pytest.mark.parametrize(
    ("free", "state", "advice"), [(1, "fail", "larger disk"), (300 * 2**20, "warn", "SPOOL_MAX_MB")]
)
async def test_reports_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, state: str, advice: str
) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    (finding,) = await check_disk(DoctorContext(env_file=None), free_bytes=lambda path: free)
    assert (finding.state, advice in finding.todo) == (state, True)


async def test_reports_an_unwritable_disk_and_leftover_journals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk = (await worst_findings(monkeypatch, "disk", DATA_DIR="/proc/guildbook"))["disk"]
    assert (disk.state, "is not writable" in disk.seen) == ("fail", True)
    (tmp_path / "data" / "spool" / "dead").mkdir(parents=True)
    (tmp_path / "data" / "spool" / "dead" / "lock").touch()
    findings = await worst_findings(monkeypatch, "disk", "spool", DATA_DIR=str(tmp_path / "data"))
    assert (findings["disk"].state, findings["spool"].state) == ("ok", "warn")
    assert sorted(entry.name for entry in (tmp_path / "data").iterdir()) == ["spool"]


# --- the port


async def test_a_free_port_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no health server" in (await worst_findings(monkeypatch, "port"))["port"].seen
    port = str(free_port())
    found = (await worst_findings(monkeypatch, "port", HEALTH_PORT=port))["port"]
    assert (found.state, found.seen) == ("ok", f"port {port} is free")
    assert (await worst_findings(monkeypatch, "port", HEALTH_PORT="0"))["port"].state == "ok"


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
async def test_reports_a_port_that_another_process_uses(monkeypatch: pytest.MonkeyPatch, host: str | None) -> None:
    if host is not None:
        monkeypatch.setenv("HEALTH_HOST", host)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_server(answer, "0.0.0.0") as server:
        port = str(server.sockets[0].getsockname()[1])
        found = (await worst_findings(monkeypatch, "port", PORT=port))["port"]
    assert found.state == "fail"
    assert f"port {port} on" in found.seen
    assert "another process uses it" in found.seen
    assert found.todo


async def test_the_bots_own_port_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    application_id = application_of_token(TOKEN)
    for of_whom, state in ((application_id, "ok"), (7, "fail"), (None, "fail")):
        server = HealthServer("127.0.0.1", 0, application_id=of_whom)
        await server.start()
        found = await worst_findings(
            monkeypatch, "port", DISCORD_TOKEN=TOKEN, HEALTH_HOST="127.0.0.1", PORT=str(server.port)
        )
        await server.stop()
        assert found["port"].state == state, of_whom


# --- the operators' guild


async def test_reports_an_admin_guild_without_the_bot(monkeypatch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    names = {"DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base}
    found = (await worst_findings(monkeypatch, "admin guild", **names))["admin guild"]
    assert (found.state, "direct messages" in found.seen) == ("ok", True)
    guilds = sorted([*simulator.world.guild_ids(), simulator.world.add_guild(members=3)])
    for guild_id in guilds:
        found = (await worst_findings(monkeypatch, "admin guild", **names, ADMIN_GUILD_ID=str(guild_id)))["admin guild"]
        assert found.state == "ok", found
    for guild_id in (guilds[0] - 1, guilds[0] + 1, guilds[-1] + 1):
        found = (await worst_findings(monkeypatch, "admin guild", **names, ADMIN_GUILD_ID=str(guild_id)))["admin guild"]
        assert (found.state, str(guild_id) in found.seen) == ("fail", True), found
        assert "invite it" in found.todo
    monkeypatch.setenv("DISCORD_TOKEN", "wrong")
    (skipped,) = await run_checks(DoctorContext(env_file=None), [c for c in CHECKS if c.name == "admin guild"])
    assert "not checked" in skipped.seen


# --- Railway's time for a shutdown


@pytest.mark.parametrize(
    ("environ", "state", "seen"),
    [
        ({}, "ok", "not Railway"),
        ({"RAILWAY_SERVICE_ID": "x"}, "warn", "is not set"),
        ({DRAINING: "0"}, "warn", "is 0"),
        ({DRAINING: "24"}, "warn", "kills the bot 24 s after SIGTERM"),
        ({DRAINING: "soon"}, "warn", "is soon"),
        ({DRAINING: "30"}, "ok", "is 30"),
    ],
)
async def test_reports_a_shutdown_that_is_cut_short(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], state: str, seen: str
) -> None:
    found = (await worst_findings(monkeypatch, "draining", **environ))["draining"]
    assert (found.state, seen in found.seen) == (state, True), found
    assert state == "ok" or "set it to 30" in found.todo


async def test_the_start_warns_of_a_shutdown_that_is_cut_short(
    tmp_path: Path, database_url: str, simulator: Simulator
) -> None:
    settings = {"DATABASE_URL": database_url, "DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base}
    async with BotProcess(tmp_path, RAILWAY_SERVICE_ID="x", **settings) as bot:
        await bot.wait_for_output(f"{DRAINING} is not set")
        await bot.wait_for_output("set it to 30")


# --- an outage


async def test_nothing_is_ok_by_what_was_known_before_an_outage(
    monkeypatch: pytest.MonkeyPatch, database: Pool, database_url: str, simulator: Simulator, tmp_path: Path
) -> None:
    of_database = {"database", "pooler", "rights", "schema", "tools"}
    monkeypatch.setenv("DATABASE_URL", database_url)
    bot_settings: dict[str, Any] = {"data_dir": tmp_path / "data", "database_url": database_url}
    async with running_bot(database, simulator, extensions=["cogs.db"], **bot_settings) as bot:
        findings = await run_checks(BotContext(bot, database))
        found = {finding.name: finding.state for finding in findings}
        assert {found[name] for name in (*of_database, "clock (database)")} == {"ok"}, findings
        async with refusing_connections(database):
            findings = await run_checks(BotContext(bot, database))
            health = await simulator.run_command("db", subcommand="health", user_id=simulator.world.operator_id)
            await health.wait_done(60, until=lambda seen: "database" in (seen.final_content or ""))
        assert "fail  database: " in (health.final_content or "")
        assert "not checked: the database cannot be reached" in (health.final_content or "")
        found = {finding.name: finding.state for finding in findings}
        assert found["database"] == "fail"
        unchecked = of_database - {"database"} | {"clock", "connections"}
        assert {f.name: (f.state, f.seen) for f in findings if f.name in unchecked} == dict.fromkeys(
            unchecked, ("warn", "not checked: the database cannot be reached")
        )
        assert "clock (database)" not in found


@asynccontextmanager
async def refusing_connections(pool: Pool) -> AsyncIterator[None]:
    """Make the server refuse all connections to a database, and end those there are."""
    name = str(pool.target.database)
    async with connect(pool.target.with_database("postgres")) as connection:
        await connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        try:
            yield
        finally:
            await connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


async def test_command_line_creates_no_database(tmp_path: Path) -> None:
    code, output = await run_cli(tmp_path, "doctor", "--json", DISCORD_API_BASE="http://127.0.0.1:9")
    assert code == 1, output
    result = json.loads(output)
    assert not result["ok"]
    assert {check["name"] for check in result["checks"]} == {check.name for check in CHECKS}
    assert os.listdir(tmp_path) == []


async def test_command_line_on_a_healthy_database(tmp_path: Path, database_url: str, simulator: Simulator) -> None:
    settings = {"DATABASE_URL": database_url, "DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base}
    code, output = await run_cli(tmp_path, "doctor", **settings)
    assert code == 0, output
    assert all(line.split()[0] in ("ok", "warn") for line in output.splitlines())
    assert simulator.token not in output
    assert "ok    cogs: no listener and no command lacks what it needs\n" in output


LEVELS = """
raise SystemExit("the doctor runs no cog")

class Levels(commands.Cog):
    intents = discord.Intents(presences=True)

    @commands.Cog.listener()
    async def on_message_edit(self, before, after): ...
"""


async def test_command_line_reads_the_cogs_of_packs(tmp_path: Path, simulator: Simulator) -> None:
    pack = write_pack(tmp_path, "levels")
    (pack / "levels" / "cogs" / "edits.py").write_text(LEVELS)
    simulator.privileged_intents = int(Intent.GUILD_MEMBERS)
    settings = {"DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base, "COGS": str(pack)}
    _, output = await run_cli(tmp_path, "doctor", **settings)
    assert "warn  intents: Presence Intent is off, and asked for by levels.edits: cogs" in output
    problem = "on_message_edit (Levels.on_message_edit) is never called without messages in memory"
    assert f"warn  cogs: levels.edits: {problem}" in output
