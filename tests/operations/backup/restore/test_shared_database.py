"""Backups of a database that other programs use too contain our objects alone, and leave theirs as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.operations.backup.helpers import (
    execute,
    fetchval,
    fill,
    make_backup,
    make_service,
    open_pool,
    scratch_schema_names,
    table_checksums,
)
from tests.operations.backup.shared import SharedDatabase, shared_database
from utils.database.embedded import EmbeddedServer
from utils.database.partitions import ensure_partitions
from utils.exceptions import BackupError, ForbiddenHere
from utils.operations.backup.archive.script import list_contents
from utils.operations.backup.restore.restore import restore

pytestmark = pytest.mark.slow


@pytest.fixture
async def shared(server: EmbeddedServer) -> AsyncIterator[SharedDatabase]:
    """Our tables, with rows, beside those of other programs that refer to them."""
    async with shared_database(server) as shared:
        async with open_pool(shared.ours) as pool:
            async with pool.acquire() as connection:
                await ensure_partitions(connection, pool.now())  # as a restore does
            await fill(pool)
        await shared.add_references()
        yield shared


async def test_backs_up_our_objects_alone(tmp_path: Path, shared: SharedDatabase) -> None:
    before = await shared.dump_others()
    service = make_service(tmp_path)
    async with open_pool(shared.ours) as pool:
        manifest = await make_backup(service, pool)
    assert manifest.rows["public.members"] == 3_000
    assert not [name for name in manifest.rows if name.startswith(("auth.", "shop.", "stats.", "public.legacy"))]
    tools = shared.server.bin_dir
    listed = await list_contents(tmp_path / "backups" / manifest.file, tools, name=manifest.file)
    for foreign in ("EXTENSION", "PUBLICATION", "EVENT TRIGGER", " auth ", " shop ", " stats ", "legacy_bans"):
        assert foreign not in listed, foreign
    assert " SEQUENCE SET ops change_ids " in listed
    assert " VIEW public role_membership " in listed
    assert await shared.dump_others() == before


async def test_a_drill_of_it_succeeds(tmp_path: Path, shared: SharedDatabase) -> None:
    service = make_service(tmp_path)
    async with open_pool(shared.ours) as pool:
        manifest = await make_backup(service, pool)
        before = await shared.dump_others()
        outcome = await service.drill(pool)
        assert outcome.ok, outcome.text
        assert outcome.data["rows"] == manifest.total_rows
    assert await shared.dump_others() == before


async def test_a_restore_leaves_everything_else_as_it_was(tmp_path: Path, shared: SharedDatabase) -> None:
    """Byte for byte: foreign rows, views, keys and triggers, and the grants, policies and comments on our tables."""
    expected = await table_checksums(shared.ours)
    service = make_service(tmp_path)
    async with open_pool(shared.ours) as pool:
        await make_backup(service, pool)
        await execute(
            shared.ours,
            "ALTER TABLE members DISABLE TRIGGER note",
            "DELETE FROM members WHERE user_id > 2000",
            "UPDATE members SET nick = 'since' WHERE user_id > 1000",
            "INSERT INTO guilds (id, name) SELECT n, 'since' FROM generate_series(100, 200) AS n",
            "INSERT INTO members (guild_id, user_id) SELECT n, n FROM generate_series(100, 200) AS n",
            "UPDATE documents SET value = '{}'",
            "ALTER TABLE members ENABLE ALWAYS TRIGGER note",
        )
        await execute(
            shared.other,
            "CREATE TABLE shop.newer AS SELECT 1 AS n",
            # Otherwise nobody knows whether deleting guilds would delete orders; shop.carts stays unreadable.
            f"GRANT USAGE ON SCHEMA shop TO {shared.ours.user}",
            f"GRANT SELECT ON shop.orders TO {shared.ours.user}",
        )
        before = await shared.dump_others()
        outcome = await service.restore(pool, "latest")
        assert outcome.ok, outcome.text
    assert await shared.dump_others() == before
    assert await table_checksums(shared.ours) == expected
    assert await fetchval(shared.superuser, "SELECT count(*) FROM shop.customers") > 0
    assert await fetchval(shared.other, "SELECT count(*) FROM shop.newer") == 1, "newer tables of others live on"
    assert await scratch_schema_names(shared.superuser) == []


async def test_a_restore_of_a_part_leaves_everything_else_as_it_was(tmp_path: Path, shared: SharedDatabase) -> None:
    """Also where other programs have triggers, policies and keys on the chosen tables."""
    service = make_service(tmp_path)
    async with open_pool(shared.ours) as pool:
        id = (await make_backup(service, pool)).id
        at_backup = await table_checksums(shared.ours)
        await execute(
            shared.ours,
            "ALTER TABLE members DISABLE TRIGGER note",
            "DELETE FROM members WHERE user_id > 2000",
            "UPDATE members SET nick = 'since' WHERE user_id > 1000",
            "UPDATE users SET username = 'since'",
            "INSERT INTO documents (guild_id, namespace, key, value) VALUES (1, 'a', 'b', '1'), (0, 'a', 'c', '1')",
            "ALTER TABLE members ENABLE ALWAYS TRIGGER note",
        )
        others, since = await shared.dump_others(), await table_checksums(shared.ours)
        assert (await restore(pool, service.catalog, id, tables=["members"])).ok
        assert (await restore(pool, service.catalog, id, documents_of=0)).ok
        documents = await pool.fetchval("SELECT array_agg(guild_id || key ORDER BY 1) FROM documents")
    assert documents == ["0b", "1b"]
    assert await shared.dump_others() == others
    expected = {**since, "public.members": at_backup["public.members"]}
    found = await table_checksums(shared.ours)
    assert {name for name in found if found[name] != expected[name]} == {"public.documents"}


@pytest.mark.parametrize("action", ["CASCADE", "SET NULL", "NO ACTION"])
async def test_refuses_to_delete_rows_that_others_refer_to(tmp_path: Path, shared: SharedDatabase, action: str) -> None:
    service = make_service(tmp_path)
    async with open_pool(shared.ours) as pool:
        id = (await make_backup(service, pool)).id
        await execute(shared.ours, "INSERT INTO guilds (id, name) VALUES (77, 'since')")
        await execute(
            shared.other,
            "ALTER TABLE shop.orders DROP CONSTRAINT orders_guild_id_fkey, ADD CONSTRAINT of_guild"
            f" FOREIGN KEY (guild_id) REFERENCES guilds (id) ON DELETE {action}",
            "INSERT INTO shop.orders VALUES (900, 77, 'since'), (901, 77, 'since')",
        )
        before, ours = await shared.dump_others(), await table_checksums(shared.ours)
        # Who may not read the table cannot know how many rows there are.
        unread = "refer to them" if action == "NO ACTION" else "which may not be read, may refer to them"
        with pytest.raises(BackupError, match=rf"shop\.orders,? {unread} .*of_guild"):
            await service.restore(pool, id)
        await execute(
            shared.other,
            f"GRANT USAGE ON SCHEMA shop TO {shared.ours.user}",
            f"GRANT SELECT ON shop.orders TO {shared.ours.user}",
        )
        with pytest.raises(BackupError, match=r"2 rows of shop\.orders, .* of public\.guilds .*of_guild") as error:
            await service.restore(pool, id)
        assert str(error.value).endswith("Nothing was changed")
        assert "\n" not in str(error.value)
        await execute(shared.other, f"REVOKE USAGE ON SCHEMA shop FROM {shared.ours.user}")
        await execute(shared.other, f"REVOKE ALL ON shop.orders FROM {shared.ours.user}")
        assert await shared.dump_others() == before
        assert await table_checksums(shared.ours) == ours
        await execute(shared.other, "DELETE FROM shop.orders WHERE id >= 900")
        await execute(shared.ours, "DELETE FROM guilds WHERE id = 77")
        assert (await service.restore(pool, id)).ok, "unreadable rows do not matter while no key vanishes"


async def test_says_which_grant_is_missing(tmp_path: Path, shared: SharedDatabase) -> None:
    name, role = shared.ours.database, shared.ours.user
    service = make_service(tmp_path)
    async with open_pool(shared.ours) as pool:
        await make_backup(service, pool)
        await execute(shared.superuser, f"ALTER DATABASE {name} OWNER TO postgres")
        grant = rf"GRANT CREATE ON DATABASE {name} TO {role}\)"
        for work in (service.drill(pool), service.restore(pool, "latest")):
            with pytest.raises(ForbiddenHere, match=grant):
                await work
        await execute(shared.superuser, f"GRANT CREATE ON DATABASE {name} TO {role}")
        assert (await service.drill(pool)).ok
        await execute(shared.superuser, "ALTER TABLE members OWNER TO postgres")
        with pytest.raises(BackupError, match=rf"public\.members belongs to postgres, and {role} may not replace"):
            await service.restore(pool, "latest")


async def test_rows_that_inherit_from_ours_are_neither_counted_nor_replaced(
    tmp_path: Path, shared: SharedDatabase
) -> None:
    service = make_service(tmp_path)
    await execute(
        shared.ours,
        "CREATE SCHEMA heirs; CREATE TABLE heirs.vip (since date) INHERITS (members);"
        " INSERT INTO heirs.vip SELECT m.*, '2026-01-01' FROM members AS m LIMIT 7",
    )
    async with open_pool(shared.ours) as pool:
        manifest = await make_backup(service, pool)
        assert manifest.rows["public.members"] == 3_000
        assert (await service.drill(pool)).ok
        await pool.execute("DELETE FROM ONLY member_stats; UPDATE ONLY members SET nick = 'gone'")
        assert (await restore(pool, service.catalog, manifest.id)).ok
        assert await pool.fetchval("SELECT count(*) FROM ONLY members WHERE nick IS DISTINCT FROM 'gone'") == 3_000
        assert await pool.fetchval("SELECT count(*) FROM heirs.vip") == 7
