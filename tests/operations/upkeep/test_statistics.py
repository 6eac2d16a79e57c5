"""The statistics of `db stats`, and their chart."""

from __future__ import annotations

import json
import struct
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_command_line import db
from utils.database import Pool
from utils.exceptions import GuildbookError
from utils.operations.upkeep import picture
from utils.operations.upkeep.statistics import collect, outcome, read_growth, sample_sizes, summarize, table_sizes


async def fill(database: Pool) -> None:
    """Write some rows and analyze them."""
    await database.execute(
        "INSERT INTO member_stats (guild_id, user_id, message_count) SELECT 1, n, n FROM generate_series(1, 2000) AS n"
    )
    await database.execute("ANALYZE member_stats")


async def test_partitions_count_with_their_table(database: Pool) -> None:
    await fill(database)
    sizes = {table.name: table for table in await table_sizes(database)}
    assert sizes["member_stats"].rows == 2_000
    assert sizes["member_stats"].bytes > 100_000
    assert {"changes", "member_events", "ops.leases", "guildbook_version"} <= sizes.keys()
    assert not [name for name in sizes if name.startswith(("changes_y", "pg_"))]
    partitioned = await database.fetchval(
        "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('changes') WHERE isleaf"
    )
    assert sizes["changes"].bytes == partitioned


async def test_old_samples_are_thinned_out(database: Pool) -> None:
    await fill(database)
    assert await sample_sizes(database) == len(await table_sizes(database))
    now = database.now()
    before = [now - timedelta(days=500), *(now - timedelta(days=40, hours=hour % 24) for hour in range(0, 12, 6))]
    for at in before:
        await database.execute("INSERT INTO ops.table_sizes VALUES ($1, 'member_stats', 1, 1000)", at)
    await database.execute(
        "INSERT INTO member_stats (guild_id, user_id) SELECT 2, n FROM generate_series(1, 5000) AS n"
    )
    await sample_sizes(database, now=now + timedelta(hours=6))
    growth = await read_growth(database)
    days = {sample.at.date() for sample in growth[:-2]}
    assert len(days) == len(growth) - 2, "one sample for each old day"
    assert now - timedelta(days=500) not in [sample.at for sample in growth]
    assert growth[-1].bytes > growth[-2].bytes > 1_000


async def test_summarizes_the_statistics(database: Pool) -> None:
    await fill(database)
    async with database.transaction():
        statistics = await collect(database, backups=[{"id": "one", "line": "one, 3 MB"}])
    lines = summarize(statistics)
    assert lines["Last backups"] == "one, 3 MB"
    assert "1 in a transaction" in lines["Sessions"]
    assert "not known yet" in lines["Growth"]
    result = outcome(statistics)
    assert "member_stats" in result.text
    assert json.loads(json.dumps(result.data, default=str))["tables"][0].keys() == {"name", "rows", "bytes", "dead"}


async def test_counts_guilds_and_users(database: Pool) -> None:
    await database.execute("INSERT INTO guilds (id, unavailable, left_at) VALUES (1, false, NULL), (2, true, NULL),"
                           " (3, false, now())")  # fmt: skip
    await database.execute("INSERT INTO users (id, bot) VALUES (1, true), (2, false), (3, NULL)")
    lines = summarize(await collect(database))
    assert (lines["Guilds"], lines["Users"]) == ("1, 1 more in an outage", "3, 1 bot among them")


async def test_draws_a_chart_with_and_without_samples(database: Pool) -> None:
    for _ in range(2):
        png = await picture.draw(await collect(database))
        assert png.startswith(b"\x89PNG")
        assert struct.unpack(">I", png[16:20]) == (960,)
        await sample_sizes(database)


async def test_drawing_has_a_timeout(database: Pool) -> None:
    with pytest.raises(GuildbookError, match=r"not drawn within 0\.001 s"):
        await picture.draw(await collect(database), timeout=0.001)


async def test_command_line_prints_json_and_writes_the_chart(tmp_path: Path, database_url: str) -> None:
    code, output = await db(tmp_path, "stats", "--json", "--picture", "stats.png", DATABASE_URL=database_url)
    assert code == 0
    data: dict[str, Any] = json.loads(output)
    assert data["ok"] is True
    assert {"server", "activity", "tables", "growth", "syncs"} <= data.keys()
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
