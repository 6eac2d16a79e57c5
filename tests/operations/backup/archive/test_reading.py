"""The rows of an archive are counted by reading all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.operations.backup.helpers import dump, execute, fill, make_backup, make_service
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.database.partitions import ensure_partitions
from utils.exceptions import BackupError
from utils.operations.action import Step
from utils.operations.backup.archive import client_tools
from utils.operations.backup.archive.reading import check_rows, count_rows
from utils.operations.backup.create import BackupRequest

#: Values that look like the end of a table or of a row, and one that is longer than what is read at a time.
ODD_VALUES = r"""
CREATE TABLE "Odd ""quoted"" table" (id int, "a b" text, c text);
INSERT INTO "Odd ""quoted"" table" VALUES
    (1, E'\\.', E'\n\\.\n'), (2, E'a\tb\r\n', ''), (3, NULL, NULL), (4, '\n', '\\n'),
    (5, repeat(E'x\n', 500000), 'COPY');
CREATE TABLE one_column (a text);
INSERT INTO one_column VALUES (''), (E'\\.'), (NULL), (E'\\'), ('COPY public.guilds (id) FROM stdin;'), (E'\n');
CREATE TABLE no_rows (a text);
"""


async def test_counts_every_row(tmp_path: Path, server: EmbeddedServer, database: Pool) -> None:
    async with database.acquire() as connection:
        await ensure_partitions(connection, database.now())
    await fill(database)
    await execute(
        database.target,
        ODD_VALUES,
        "INSERT INTO changes (guild_id, table_name, key, action) SELECT n, 'members', '{}', 'update'"
        " FROM generate_series(1, 700) AS n",
        "INSERT INTO changes (id, guild_id, table_name, key, action) VALUES (1, 1, 'members', '{}', 'update')",
    )
    archive = await dump(server, database.target, tmp_path / "a 'dump'")
    expected = {".".join(name): rows for name, rows in archive.counts.items()}
    assert expected['public.Odd "quoted" table'] == 5
    assert expected["public.changes"] == 701, "in two partitions"
    assert await count_rows(archive.file, archive.tools, expected) == expected
    by_partition = await count_rows(archive.file, archive.tools)
    assert by_partition["public.changes_default"] == 1
    assert sum(by_partition.values()) == sum(expected.values())


async def test_accepts_what_create_made(tmp_path: Path, database: Pool) -> None:
    await fill(database)
    service = make_service(tmp_path)
    tools = await find_tools(database)
    steps: list[Step] = []
    partial = BackupRequest(tables=("members", "ops.suppressions"))
    for request in (BackupRequest(), partial, BackupRequest(schema_only=True)):
        manifest = await make_backup(service, database, request)
        file = service.catalog.local.path / manifest.file
        await check_rows(manifest, file, tools, progress=steps.append)
        assert steps[-1] == Step("counting rows", manifest.total_rows, manifest.total_rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"public.members": 3_001}, r"public\.members: 3,000 rows, expected 3,001: use another backup"),
        ({"public.members": 2_999}, r"public\.members: 3,000 rows, expected 2,999"),
        ({"public.members": 0}, r"public\.members: 3,000 rows, expected 0"),
        ({"public.members": None}, r"public\.members: 3,000 rows, expected 0"),
        ({"public.pets": 4}, r"public\.pets: 0 rows, expected 4"),
        ({f"public.pets{n}": 4 for n in range(7)}, r"pets4: 0 rows, expected 4 and 2 more"),
        ({"public.members": 2_990, "public.users": 3_010}, r"members: 3,000 rows.*; public\.users: 3,000 rows"),
    ],
)
async def test_names_the_tables_that_differ_with_both_numbers(
    tmp_path: Path, database: Pool, rows: dict[str, int | None], message: str
) -> None:
    await fill(database)
    service = make_service(tmp_path)
    manifest = await make_backup(service, database)
    changed = {name: number for name, number in (manifest.rows | rows).items() if number is not None}
    file = service.catalog.local.path / manifest.file
    with pytest.raises(BackupError, match=message):
        await check_rows(replace(manifest, rows=changed), file, await find_tools(database))


@pytest.mark.parametrize("size", [0, 5, 0.5, 0.9, 0.999])
async def test_refuses_a_truncated_archive(tmp_path: Path, database: Pool, size: float) -> None:
    await fill(database)
    service = make_service(tmp_path)
    manifest = await make_backup(service, database)
    file = service.catalog.local.path / manifest.file
    content = file.read_bytes()
    file.write_bytes(content[: int(size if size >= 1 else size * len(content))])
    with pytest.raises(BackupError, match=r"pg_restore could not read the backup: |does not have the rows"):
        await check_rows(manifest, file, await find_tools(database))


async def find_tools(pool: Pool) -> Path:
    """Return the directory of the client programs for the server."""
    return await client_tools.find_directory(pool.server_version_num // 10_000)
