"""What `db stats` says, and the picture beside it."""

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
from utils.operations.upkeep import picture, sizes
from utils.operations.upkeep.statistics import collect, figures, outcome


async def filled(database: Pool) -> None:
    """Write some rows of which the planner knows."""
    await database.execute(
        "INSERT INTO member_stats (guild_id, user_id, message_count) SELECT 1, n, n FROM generate_series(1, 2000) AS n"
    )
    await database.execute("ANALYZE member_stats")


async def test_every_table_is_there_once_with_its_partitions(database: Pool) -> None:
    await filled(database)
    found = {one.name: one for one in await sizes.sizes(database)}
    assert found["member_stats"].rows == 2_000
    assert found["member_stats"].bytes > 100_000
    assert {"changes", "member_events", "ops.leases", "alembic_version"} <= found.keys()
    assert not [name for name in found if name.startswith(("changes_y", "pg_"))]
    partitioned = await database.fetchval(
        "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('changes') WHERE isleaf"
    )
    assert found["changes"].bytes == partitioned


async def test_growth_is_what_samples_say_and_old_ones_are_thinned_out(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(database)
    assert await sizes.sample(database) == len(await sizes.sizes(database))
    now = database.now()
    before = [now - timedelta(days=500), *(now - timedelta(days=40, hours=hour % 24) for hour in range(0, 12, 6))]
    for at in before:
        await database.execute("INSERT INTO ops.table_sizes VALUES ($1, 'member_stats', 1, 1000)", at)
    await database.execute(
        "INSERT INTO member_stats (guild_id, user_id) SELECT 2, n FROM generate_series(1, 5000) AS n"
    )
    monkeypatch.setattr(database, "now", lambda: now + timedelta(hours=6))
    await sizes.sample(database)
    grown = await sizes.growth(database)
    days = {sample.at.date() for sample in grown[:-2]}
    assert len(days) == len(grown) - 2, "of the old ones one a day"
    assert now - timedelta(days=500) not in [sample.at for sample in grown]
    assert grown[-1].bytes > grown[-2].bytes > 1_000


async def test_the_figures_name_what_an_operator_looks_for(database: Pool) -> None:
    await filled(database)
    async with database.transaction():
        found = await collect(database, backups=[{"id": "one", "line": "one, 3 MB"}])
    shown = figures(found)
    assert shown["Last backups"] == "one, 3 MB"
    assert "1 in a transaction" in shown["Sessions"]
    assert "not known yet" in shown["Growth"]
    told = outcome(found)
    assert "member_stats" in told.text
    assert json.loads(json.dumps(told.data, default=str))["tables"][0].keys() == {"name", "rows", "bytes", "dead"}


async def test_the_picture_is_one_with_and_without_samples(database: Pool) -> None:
    for _ in range(2):
        png = await picture.draw(await collect(database))
        assert png.startswith(b"\x89PNG")
        assert struct.unpack(">II", png[16:24]) == (1080, 480)
        await sizes.sample(database)


async def test_a_picture_that_cannot_be_drawn_says_why(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = await collect(database)
    monkeypatch.setattr(picture, "DRAW_SECONDS", 0.001)
    with pytest.raises(GuildbookError, match=r"not drawn within 0\.001 s"):
        await picture.draw(found)


async def test_the_command_line_prints_one_object_and_writes_the_picture(tmp_path: Path, database_url: str) -> None:
    code, output = await db(tmp_path, "stats", "--json", "--picture", "stats.png", DATABASE_URL=database_url)
    assert code == 0
    data: dict[str, Any] = json.loads(output)
    assert data["ok"] is True
    assert {"server", "activity", "tables", "growth", "syncs"} <= data.keys()
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
