"""The schema: marks on every column, keys that can be sharded, documented names."""

from __future__ import annotations

import pytest
from sqlalchemy import BigInteger, DateTime, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import class_mapper
from sqlalchemy.schema import CreateTable

from models import Base, Erase, Part, User, mirrored_tables, part_of

TABLES = dict(Base.metadata.tables)
MIRRORED = mirrored_tables()

#: Columns that operators and scripts rely on.
DOCUMENTED = {
    "guilds": "id name icon splash discovery_splash banner description owner_id preferred_locale afk_channel_id "
    "afk_timeout verification_level default_message_notifications explicit_content_filter mfa_level nsfw_level "
    "application_id system_channel_id system_channel_flags rules_channel_id public_updates_channel_id joined_at large "
    "unavailable member_count max_members premium_tier premium_subscription_count vanity_url_code features created_at "
    "left_at is_active updated_at",
    "users": "id username discriminator global_name avatar banner accent_color bot system public_flags flags locale "
    "mfa_enabled verified premium_type created_at updated_at",
    "members": "guild_id user_id nick avatar roles joined_at premium_since timed_out_until pending flags left_at "
    "updated_at",
    "roles": "guild_id id name color hoist icon unicode_emoji position permissions managed mentionable tags flags "
    "deleted_at",
    "channels": "guild_id id name type parent_id position topic nsfw slowmode permission_overwrites flags hidden "
    "deleted_at",
    "threads": "guild_id id name type parent_id owner_id archived locked auto_archive_duration archived_at deleted_at",
    "changes": "guild_id id table_name key action user_id before after at",
    "user_changes": "user_id id table_name key action before after at",
    "member_events": "guild_id id user_id kind at inferred earliest latest",
    "member_stats": "guild_id user_id message_count last_active_at xp",
    "sync_runs": "guild_id started_at finished_at state pages rows_seen rows_inserted rows_updated rows_left error",
}
KEYS = {
    "guilds": ["id"],
    "users": ["id"],
    "members": ["guild_id", "user_id"],
    "changes": ["guild_id", "id"],
    "user_changes": ["user_id", "id"],
    "member_events": ["guild_id", "id"],
    "member_stats": ["guild_id", "user_id"],
} | {name: ["guild_id", "id"] for name in ("roles", "channels", "threads")}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_column_has_an_erase_mark(name: str) -> None:
    for column in TABLES[name].columns:
        assert isinstance(column.info.get("erase"), Erase), f"{name}.{column.name}"


@pytest.mark.parametrize("name", sorted(TABLES))
def test_personal_columns_have_a_subject_column(name: str) -> None:
    marks = {column.info["erase"] for column in TABLES[name].columns}
    assert Erase.CLEAR not in marks or Erase.SUBJECT in marks, f"{name} has columns to clear but no subject column"


@pytest.mark.parametrize("name", sorted(TABLES))
def test_columns_to_clear_can_be_empty(name: str) -> None:
    for column in TABLES[name].columns:
        if column.info["erase"] is Erase.CLEAR:
            assert column.nullable or column.server_default is not None, f"{name}.{column.name}"
            assert not column.primary_key


@pytest.mark.parametrize("name", ["threads"])
def test_history_of_personal_rows_has_the_user_id(name: str) -> None:
    from utils.mirror.records.rows import Mode, value_columns
    from utils.mirror.write import merge_sql

    clears = [column.name for column in MIRRORED[name].columns if column.info["erase"] is Erase.CLEAR]
    assert clears
    inserted = merge_sql.merge_arrays(name, value_columns(name), Mode.MERGE).split("INSERT INTO changes ", 1)[1]
    assert "user_id" in inserted.split(")", 1)[0]


@pytest.mark.parametrize("name", sorted(MIRRORED))
def test_every_mirrored_column_has_a_merge_part(name: str) -> None:
    parts = {column.name: column.info.get("part") for column in MIRRORED[name].columns}
    assert all(isinstance(part, Part) for part in parts.values()), parts
    found = [part for part in parts.values() if part in (Part.STAMP, Part.TOUCHED, Part.TOMBSTONE)]
    expected = [Part.STAMP, Part.TOUCHED] + ([] if name == "users" else [Part.TOMBSTONE])
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert parts["stamp"] is Part.STAMP
    assert parts["updated_at"] is Part.TOUCHED


def test_lists_the_mirrored_tables() -> None:
    assert set(MIRRORED) == {"guilds", "users", "members", "roles", "channels", "threads"}
    assert part_of(TABLES["sync_runs"].columns["pages"]) is Part.DATA


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_documented_columns_exist(name: str) -> None:
    assert set(DOCUMENTED[name].split()) <= set(TABLES[name].columns.keys())


@pytest.mark.parametrize("name", sorted(KEYS))
def test_documented_primary_keys(name: str) -> None:
    assert [column.name for column in TABLES[name].primary_key.columns] == KEYS[name]


@pytest.mark.parametrize("name", sorted(name for name, table in TABLES.items() if table.schema is None))
def test_guild_owned_tables_can_be_sharded_by_guild(name: str) -> None:
    table = TABLES[name]
    if "guild_id" not in table.columns:
        assert name in ("guilds", "users", "user_changes")
        return
    assert not table.columns["guild_id"].nullable
    assert next(iter(table.primary_key.columns)).name == "guild_id"
    for index in table.indexes:
        assert not index.unique or "guild_id" in index.columns.keys()  # noqa: SIM118 - a column collection
    for key in table.foreign_keys:
        assert key.column.table.name == "guilds"


@pytest.mark.parametrize("name", sorted(TABLES))
def test_no_foreign_keys_to_users_and_no_serial_ids(name: str) -> None:
    table = TABLES[name]
    assert all(key.column.table.name != "users" for key in table.foreign_keys)
    ddl = str(CreateTable(table).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]
    if name not in ("ops.admin_actions", "ops.dead_letters", "ops.migrations"):  # ids assigned by the database
        assert "SERIAL" not in ddl


@pytest.mark.parametrize("name", sorted(TABLES))
def test_ids_are_bigint_and_timestamps_have_a_time_zone(name: str) -> None:
    for column in TABLES[name].columns:
        if column.name == "id" or column.name.endswith("_id"):
            assert isinstance(column.type, BigInteger), f"{name}.{column.name}"
        if isinstance(column.type, DateTime):
            assert column.type.timezone, f"{name}.{column.name}"
        if column.name.endswith("_at"):
            assert isinstance(column.type, DateTime), f"{name}.{column.name}"


def test_no_table_stores_email_addresses() -> None:
    assert not [name for table in TABLES.values() for name in table.columns.keys() if "mail" in name]  # noqa: SIM118


def test_every_model_has_its_own_table() -> None:
    # Mappers of other tests' tables stay until they are collected.
    mappers = [mapper for mapper in Base.registry.mappers if mapper.class_.__module__.startswith("models.")]
    tables = [mapper.local_table for mapper in mappers]
    assert all(isinstance(table, Table) for table in tables)
    assert len({str(table) for table in tables}) == len(tables)
    assert {table.name for table in TABLES.values()} <= {table.name for table in tables if isinstance(table, Table)}
    assert class_mapper(User).local_table is TABLES["users"]


#: Discord API reference, "Image Formatting" and "CDN Endpoints".
AVATARS = [
    ({"avatar": "abc", "discriminator": "0"}, "avatars/175928847299117063/abc.png"),
    ({"avatar": "a_abc", "discriminator": "0"}, "avatars/175928847299117063/a_abc.gif"),
    ({"avatar": None, "discriminator": "0"}, f"embed/avatars/{(175928847299117063 >> 22) % 6}.png"),
    ({"avatar": None, "discriminator": None}, f"embed/avatars/{(175928847299117063 >> 22) % 6}.png"),
    ({"avatar": None, "discriminator": "0007"}, "embed/avatars/2.png"),
]


@pytest.mark.parametrize(("values", "path"), AVATARS)
def test_avatar_url(values: dict[str, str | None], path: str) -> None:
    assert User(id=175928847299117063, **values).avatar_url == f"https://cdn.discordapp.com/{path}"
