"""`python bot.py doctor`: what is wrong is said, with what to do, and nothing that is wrong stops the others."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import Limits, Simulator, World
from simulator.state import Intent
from tests.bot.running import run_cli as bot
from tests.operations.migrations.support import HEAD, KNOWN
from utils.database import ConnectTarget, Pool
from utils.operations import migrations
from utils.operations.doctor import CHECKS, Check, Finding, examine, examined
from utils.operations.doctor.configuration import shape_of
from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import CheckSkipped
from utils.settings import variables

WORST = ("fail", "warn", "ok")
TOKEN = base64.b64encode(b"80351110224678912").decode().rstrip("=") + ".GabcdE.s3cr3t-signature_of_a_token"


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """A Discord with one small guild."""
    world = World(seed=11)
    world.add_guild(members=5, name="Small")
    async with Simulator(world, limits=Limits.none()) as running:
        yield running


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the operator's own environment."""
    for name in (*variables(), "PGSERVICE", "PGHOSTADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


async def found(monkeypatch: pytest.MonkeyPatch, *names: str, **settings: str) -> dict[str, Finding]:
    """Run the checks of these names, or all, with these settings; the worst finding of each name."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    checks = [check for check in CHECKS if not names or check.name in names]
    worst: dict[str, Finding] = {}
    for finding in await examine(DoctorContext(env_file=".env", environ=settings), checks):
        if finding.name not in worst or WORST.index(finding.state) < WORST.index(worst[finding.name].state):
            worst[finding.name] = finding
    return worst


async def test_all_is_well_on_a_database_that_is_well(
    monkeypatch: pytest.MonkeyPatch, database: Pool, database_url: str, simulator: Simulator
) -> None:
    settings = {"DATABASE_URL": database_url, "DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base}
    findings = await found(monkeypatch, **settings)
    not_well = {name for name, finding in findings.items() if finding.state != "ok"}
    assert not_well <= {"token", "backups"}, findings  # the simulator's token has no real one's shape
    row = await database.fetchrow("SELECT command, result FROM ops.admin_actions")
    assert row is not None
    assert row["command"] == "doctor"
    assert "0 fail" in row["result"]


async def test_one_check_that_crashes_or_hangs_does_not_stop_the_others() -> None:
    async def well(patient: DoctorContext) -> Sequence[Finding]:
        return [Finding("ok", "well", "fine")]

    async def crashes(patient: DoctorContext) -> Sequence[Finding]:
        raise ZeroDivisionError("by nothing")

    async def hangs(patient: DoctorContext) -> Sequence[Finding]:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling() > 1:  # type: ignore[union-attr]
                    raise

    async def cannot(patient: DoctorContext) -> Sequence[Finding]:
        raise CheckSkipped("nothing is there")

    checks = [Check("crashes", crashes, 5), Check("hangs", hangs, 0.05), Check("well", well, 5), Check("no", cannot, 5)]
    async with asyncio.timeout(10):
        lines = [finding.line for finding in await examined(DoctorContext(env_file=None), checks)]
    assert lines == [
        "fail  crashes: the check itself failed: ZeroDivisionError: by nothing; report it, with this line",
        "fail  hangs: no answer within 0.05 s; something it asks hangs: look at what it is about",
        "ok    well: fine",
        "warn  no: not looked at: nothing is there",
    ]
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


async def test_every_wrong_setting_is_a_line_and_the_rest_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    settings = {"DB_POOL_MAX": "many", "FLUSH_ROWS": "-1", "DATABASE_URL": database_url}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    findings = await examine(DoctorContext(env_file=None, environ=settings), CHECKS)
    wrong = [finding.seen for finding in findings if finding.name == "settings"]
    assert [line.partition(":")[0] for line in wrong] == ["DB_POOL_MAX", "FLUSH_ROWS"]
    states = {finding.name: finding.state for finding in findings}
    assert (states["database"], states["schema"], states["connections"]) == ("ok", "ok", "warn")


async def test_misspelt_variables_are_told_with_what_was_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DISCORD_TOKE=s3cr3t\nUNRELATED=1\nDB_POOL_SIZE=3\n")
    findings = await examine(
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
    ("token", "wrong"),
    [
        (TOKEN, None),
        ("a.b", "three parts"),
        ("x" * 32, "client secret"),
        (base64.b64encode(b"hello").decode() + ".b.c", "application's id"),
        ("!!!.b.c", "application's id"),
        ("ü.b.c", "application's id"),
    ],
)
def test_the_shape_of_a_token(token: str, wrong: str | None) -> None:
    said = shape_of(token)
    assert said is None if wrong is None else said is not None and wrong in said


@given(st.text())
def test_the_shape_of_anything_is_told_without_it(token: str) -> None:
    said = shape_of(token)
    assert said is None or len(token) < 12 or token not in said


async def test_discord_that_does_not_know_the_token_or_shows_no_members(
    monkeypatch: pytest.MonkeyPatch, simulator: Simulator
) -> None:
    base = simulator.api_base
    findings = await found(monkeypatch, "discord", DISCORD_TOKEN=TOKEN, DISCORD_API_BASE=base)
    assert (findings["discord"].state, findings["discord"].seen) == ("fail", "it does not know this token")
    simulator.privileged_intents &= ~Intent.GUILD_MEMBERS
    findings = await found(monkeypatch, "discord", DISCORD_TOKEN=simulator.token, DISCORD_API_BASE=base)
    assert (findings["discord"].state, findings["intents"].state) == ("ok", "fail")
    assert "Privileged Gateway Intents" in findings["intents"].todo


async def test_discord_out_of_reach_or_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = await found(monkeypatch, "discord", DISCORD_TOKEN=TOKEN, DISCORD_API_BASE="http://127.0.0.1:9")
    assert "out of reach" in findings["discord"].seen
    monkeypatch.setattr("utils.operations.doctor.outside.SECONDS", 0.05)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    findings = await found(monkeypatch, "discord", DISCORD_TOKEN=TOKEN, DISCORD_API_BASE=f"http://127.0.0.1:{port}")
    server.close()
    assert "no answer in time" in findings["discord"].seen
    assert "s3cr3t" not in str(findings)


async def test_a_database_out_of_reach_is_one_failure_and_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = await found(
        monkeypatch, "database", "schema", "rights", DATABASE_URL="postgresql://amy:s3cr3t@127.0.0.1:9/guilds"
    )
    assert {name: finding.state for name, finding in findings.items()} == {
        "database": "fail", "rights": "warn", "schema": "warn",
    }  # fmt: skip
    assert "DATABASE_URL" in findings["database"].seen
    assert findings["database"].todo
    assert "s3cr3t" not in str(findings)


async def test_no_schema_an_old_one_and_one_that_was_taken_down(
    monkeypatch: pytest.MonkeyPatch, empty_target: ConnectTarget
) -> None:
    url = empty_target.libpq_url()
    findings = await found(monkeypatch, "schema", DATABASE_URL=url)
    assert (findings["schema"].state, findings["schema"].seen) == ("warn", "there is none yet")
    await migrations.upgrade(empty_target, KNOWN[0])
    findings = await found(monkeypatch, "schema", DATABASE_URL=url, AUTO_MIGRATE="false")
    assert (findings["schema"].state, findings["schema"].todo) == ("fail", "run python bot.py db upgrade")
    await migrations.pause_auto_migrate(empty_target, KNOWN[0])
    findings = await found(monkeypatch, "schema", DATABASE_URL=url, AUTO_MIGRATE="true")
    assert (findings["schema"].state, findings["AUTO_MIGRATE"].state) == ("fail", "warn")
    await migrations.upgrade(empty_target)
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    await conn.execute("ALTER TABLE roles ADD COLUMN surprise text")
    findings = await found(monkeypatch, "schema", DATABASE_URL=url)
    assert (findings["schema"].state, findings["drift"].state) == ("ok", "fail")
    await conn.execute("UPDATE alembic_version SET version_num = '9999'")
    await conn.close()
    findings = await found(monkeypatch, "schema", DATABASE_URL=url)
    assert "this version does not know" in findings["schema"].seen
    assert HEAD != "9999"


async def test_a_user_who_may_do_little_and_a_server_with_few_connections(
    monkeypatch: pytest.MonkeyPatch, empty_target: ConnectTarget
) -> None:
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    await conn.execute("DROP ROLE IF EXISTS doctor_guest; CREATE ROLE doctor_guest LOGIN CONNECTION LIMIT 12")
    await conn.execute("REVOKE TEMPORARY ON DATABASE " + str(empty_target.database) + " FROM PUBLIC")
    url = empty_target.libpq_url().replace("postgres@", "doctor_guest@")
    for name, value in {"DATABASE_URL": url, "DB_POOL_MAX": "10"}.items():
        monkeypatch.setenv(name, value)
    checks = [check for check in CHECKS if check.name in ("rights", "connections")]
    findings = await examine(DoctorContext(env_file=None), checks)
    rights = [finding for finding in findings if finding.name == "rights"]
    assert [finding.state for finding in rights] == ["fail", "fail", "fail", "warn"]
    assert 'GRANT CREATE ON SCHEMA public TO "doctor_guest"' in rights[1].todo
    assert [(f.state, "DB_POOL_MAX (10)" in f.todo) for f in findings if f.name == "connections"] == [("fail", True)]
    await conn.execute("DROP OWNED BY doctor_guest; DROP ROLE doctor_guest")
    await conn.close()


async def test_a_full_disk_one_that_cannot_be_written_and_what_a_killed_process_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage: Any = type("Usage", (), {"free": 1})
    with monkeypatch.context() as patched:
        patched.setattr("utils.operations.doctor.machine.shutil.disk_usage", lambda path: usage)
        assert (await found(patched, "disk", DATA_DIR=str(tmp_path / "data")))["disk"].state == "fail"
        usage.free = 300 * 2**20
        assert "SPOOL_MAX_MB" in (await found(patched, "disk", DATA_DIR=str(tmp_path / "data")))["disk"].todo
    refused = (await found(monkeypatch, "disk", DATA_DIR="/proc/guildbook"))["disk"]
    assert (refused.state, "cannot be written" in refused.seen) == ("fail", True)
    (tmp_path / "data" / "spool" / "dead").mkdir(parents=True)
    (tmp_path / "data" / "spool" / "dead" / "lock").touch()
    findings = await found(monkeypatch, "disk", "spool", DATA_DIR=str(tmp_path / "data"))
    assert (findings["disk"].state, findings["spool"].state) == ("ok", "warn")
    assert sorted(entry.name for entry in (tmp_path / "data").iterdir()) == ["spool"]


async def test_the_command_line_without_a_database_makes_none(tmp_path: Path) -> None:
    code, output = await bot(tmp_path, "doctor", "--json", DISCORD_API_BASE="http://127.0.0.1:9")
    assert code == 1, output
    told = json.loads(output)
    assert not told["ok"]
    assert {check["name"] for check in told["checks"]} == {check.name for check in CHECKS}
    assert os.listdir(tmp_path) == []


async def test_the_command_line_with_a_database_that_is_well(
    tmp_path: Path, database_url: str, simulator: Simulator
) -> None:
    settings = {"DATABASE_URL": database_url, "DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base}
    code, output = await bot(tmp_path, "doctor", **settings)
    assert code == 0, output
    assert all(line.split()[0] in ("ok", "warn") for line in output.splitlines())
    assert simulator.token not in output
