"""Payloads, in the shapes of Discord's API reference, become rows."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tests.mirror.tables import GUILD, when
from utils.database import Pool
from utils.mirror import Mirror
from utils.mirror.discord.source import DiscordSource
from utils.mirror.discord.tap import decode
from utils.mirror.reconcile.reconciler import ReconcilePolicy
from utils.mirror.records.rows import Row
from utils.mirror.records.validation import validate_row
from utils.mirror.spool.queue import EventQueue
from utils.mirror.translate import objects
from utils.mirror.translate.live import ROW_PARSERS
from utils.mirror.translate.objects import Payload
from utils.mirror.translate.snapshots import read_snapshot
from utils.mirror.write.writer import FlushPolicy
from utils.service import metrics
from utils.service.lease import Fence

G, AT = str(GUILD), when(99)
USER: Payload = {
    "id": "7", "username": "ann", "discriminator": "0", "global_name": "Ann", "avatar": None, "public_flags": 64,
    "avatar_decoration_data": None, "primary_guild": None, "collectibles": None,
}  # fmt: skip
MEMBER: Payload = {
    "user": USER, "nick": None, "avatar": None, "banner": None, "roles": ["30", "4"], "deaf": False, "mute": False,
    "joined_at": "2024-05-01T00:00:10.123000+00:00", "premium_since": None, "pending": False, "flags": 0,
    "communication_disabled_until": None,
}  # fmt: skip
ROLE: Payload = {
    "id": "4", "name": "admin", "color": 255, "colors": {"primary_color": 255}, "hoist": True, "icon": None,
    "unicode_emoji": None, "position": 1, "permissions": "9007199254740993", "managed": False, "mentionable": True,
    "flags": 0,
}  # fmt: skip
CHANNEL: Payload = {
    "id": "5", "guild_id": G, "type": 0, "name": "general", "position": 2, "topic": None, "nsfw": False,
    "parent_id": "6", "rate_limit_per_user": 5, "last_message_id": "99", "flags": 0,
    "permission_overwrites": [
        {"id": "9", "type": 0, "allow": "0", "deny": "1"}, {"id": "8", "type": 1, "allow": "1", "deny": "0"},
    ],
}  # fmt: skip
THREAD: Payload = {
    "id": "50", "guild_id": G, "parent_id": "5", "owner_id": "7", "type": 11, "name": "t", "flags": 0,
    "rate_limit_per_user": 0, "message_count": 3, "member_count": 2, "total_message_sent": 3, "last_message_id": "51",
    "thread_metadata": {
        "archived": False, "auto_archive_duration": 1440, "archive_timestamp": "2024-05-01T00:00:00+00:00",
        "locked": False, "create_timestamp": "2024-05-01T00:00:00+00:00",
    },
}  # fmt: skip
GUILD_UPDATE: Payload = {
    "id": G, "name": "g", "icon": None, "splash": None, "discovery_splash": None, "owner_id": "7", "banner": None,
    "afk_channel_id": None, "afk_timeout": 300, "verification_level": 1, "default_message_notifications": 0,
    "explicit_content_filter": 0, "roles": [ROLE], "emojis": [], "features": ["NEWS", "COMMUNITY"], "mfa_level": 0,
    "application_id": None, "system_channel_id": "5", "system_channel_flags": 0, "rules_channel_id": None,
    "vanity_url_code": None, "description": None, "premium_tier": 0, "premium_subscription_count": 0,
    "preferred_locale": "en-US", "public_updates_channel_id": None, "nsfw_level": 0, "max_members": 500000,
}  # fmt: skip
GUILD_CREATE: Payload = GUILD_UPDATE | {
    "joined_at": "2024-05-01T00:00:00+00:00", "large": False, "unavailable": False, "member_count": 2, "members": [],
    "channels": [CHANNEL], "threads": [THREAD], "voice_states": [], "presences": [], "stage_instances": [],
}  # fmt: skip

#: Event, payload (Discord API reference, "Gateway Events"), rows: (table, key, whether it can make a row).
SHAPES: list[tuple[str, Payload, list[tuple[str, tuple[int, ...], bool]]]] = [
    ("USER_UPDATE", USER | {"locale": "de", "verified": True, "flags": 0}, [("users", (7,), True)]),
    ("GUILD_UPDATE", GUILD_UPDATE, [("guilds", (GUILD,), False)]),
    ("GUILD_DELETE", {"id": G, "unavailable": True}, [("guilds", (GUILD,), False)]),
    ("GUILD_DELETE", {"id": G}, [("guilds", (GUILD,), False)]),
    ("GUILD_MEMBER_ADD", MEMBER | {"guild_id": G}, [("users", (7,), True), ("members", (GUILD, 7), True)]),
    ("GUILD_MEMBER_UPDATE", MEMBER | {"guild_id": G}, [("users", (7,), True), ("members", (GUILD, 7), True)]),
    (
        "GUILD_MEMBER_UPDATE",
        {"guild_id": G, "user": USER, "roles": [], "joined_at": None, "avatar": None, "banner": None},
        [("users", (7,), True), ("members", (GUILD, 7), False)],
    ),
    ("GUILD_MEMBER_REMOVE", {"guild_id": G, "user": USER}, [("users", (7,), True), ("members", (GUILD, 7), False)]),
    ("GUILD_ROLE_CREATE", {"guild_id": G, "role": ROLE}, [("roles", (GUILD, 4), True)]),
    ("GUILD_ROLE_UPDATE", {"guild_id": G, "role": ROLE}, [("roles", (GUILD, 4), True)]),
    ("GUILD_ROLE_DELETE", {"guild_id": G, "role_id": "4"}, [("roles", (GUILD, 4), False)]),
    ("CHANNEL_CREATE", CHANNEL, [("channels", (GUILD, 5), True)]),
    ("CHANNEL_UPDATE", CHANNEL, [("channels", (GUILD, 5), True)]),
    ("CHANNEL_DELETE", CHANNEL, [("channels", (GUILD, 5), False)]),
    ("CHANNEL_CREATE", {"id": "5", "type": 1, "recipients": [USER]}, []),
    ("CHANNEL_DELETE", {"id": "5", "type": 1}, []),
    ("THREAD_CREATE", THREAD | {"newly_created": True}, [("threads", (GUILD, 50), True)]),
    ("THREAD_UPDATE", THREAD, [("threads", (GUILD, 50), True)]),
    ("THREAD_DELETE", {"id": "50", "guild_id": G, "parent_id": "5", "type": 11}, [("threads", (GUILD, 50), False)]),
    (
        "THREAD_LIST_SYNC",
        {"guild_id": G, "channel_ids": ["5"], "threads": [THREAD, THREAD | {"id": "51"}], "members": []},
        [("threads", (GUILD, 50), True), ("threads", (GUILD, 51), True)],
    ),
]  # fmt: skip


def read(event: str, payload: Payload) -> list[Row]:
    return [validate_row(row) for row in ROW_PARSERS[event](payload, AT)]


@pytest.mark.parametrize(("event", "payload", "expected"), SHAPES)
def test_parses_each_dispatch_into_rows(
    event: str, payload: Payload, expected: list[tuple[str, tuple[int, ...], bool]]
) -> None:
    assert [(row.table, row.key, row.may_insert) for row in read(event, payload)] == expected


def test_every_parser_has_an_example() -> None:
    assert {event for event, _, _ in SHAPES} == ROW_PARSERS.keys()


def test_parses_member_roles_and_timestamps() -> None:
    values = read("GUILD_MEMBER_ADD", MEMBER | {"guild_id": G})[1].values
    assert values["roles"] == [4, 30]
    assert values["joined_at"] == datetime(2024, 5, 1, 0, 0, 10, 123000, tzinfo=UTC)
    assert values["left_at"] is None


def test_absent_fields_of_joins_are_none_of_updates_unchanged() -> None:
    bare: Payload = {"guild_id": G, "user": USER, "roles": [], "joined_at": None}
    assert read("GUILD_MEMBER_ADD", bare)[1].values.keys() >= {"nick", "pending", "flags", "timed_out_until"}
    assert read("GUILD_MEMBER_UPDATE", bare)[1].values.keys() == {"roles", "joined_at", "left_at"}
    assert read("GUILD_MEMBER_UPDATE", bare | {"nick": None})[1].values["nick"] is None


def test_a_partial_user_updates_only() -> None:
    row = validate_row(objects.user({"id": "7", "avatar": None}))
    assert (row.values, row.may_insert) == ({"avatar": None}, False)


def test_private_user_fields_are_read_for_the_bot_only() -> None:
    payload = USER | {"locale": "de", "verified": True, "banner": "b", "accent_color": 3}
    assert not objects.user(payload).values.keys() & {"locale", "verified", "banner", "accent_color"}
    assert objects.user(payload, own=True).values["locale"] == "de"
    assert "banner" not in objects.user(USER, own=True).values


def test_absent_user_flags_are_false() -> None:
    assert (objects.user(USER).values["bot"], objects.user(USER).values["system"]) == (False, False)
    assert objects.user(USER | {"bot": True}).values["bot"] is True


def test_parses_role_permissions_exactly_and_optional_tags() -> None:
    values = read("GUILD_ROLE_CREATE", {"guild_id": G, "role": ROLE})[0].values
    assert (values["permissions"], values["tags"], values["deleted_at"]) == (9007199254740993, None, None)
    tagged = read("GUILD_ROLE_UPDATE", {"guild_id": G, "role": ROLE | {"tags": {"premium_subscriber": None}}})
    assert tagged[0].values["tags"] == '{"premium_subscriber":null}'


def test_sorts_lists_of_varying_order() -> None:
    other = CHANNEL | {"permission_overwrites": CHANNEL["permission_overwrites"][::-1]}
    assert read("CHANNEL_UPDATE", CHANNEL) == read("CHANNEL_UPDATE", other)
    assert read("GUILD_UPDATE", GUILD_UPDATE)[0].values["features"] == ["COMMUNITY", "NEWS"]


def test_a_hidden_channel_keeps_its_stored_fields() -> None:
    hidden = CHANNEL | {
        "name": "___hidden___", "flags": 1 << 17, "topic": None, "parent_id": None,
        "permission_overwrites": [{"id": G, "type": 0, "allow": "0", "deny": "1024"}],
    }  # fmt: skip
    values = read("CHANNEL_UPDATE", hidden)[0].values
    assert values == {"type": 0, "position": 2, "hidden": True, "deleted_at": None}
    assert read("CHANNEL_UPDATE", CHANNEL)[0].values["hidden"] is False


def test_absent_channel_fields_are_unchanged() -> None:
    values = read("CHANNEL_UPDATE", {"id": "5", "guild_id": G, "name": "n", "topic": None})[0].values
    assert values == {"name": "n", "topic": None, "hidden": False, "deleted_at": None}


def test_archived_at_is_set_only_while_archived() -> None:
    assert read("THREAD_UPDATE", THREAD)[0].values["archived_at"] is None
    archived = THREAD | {"thread_metadata": THREAD["thread_metadata"] | {"archived": True, "invitable": False}}
    values = read("THREAD_UPDATE", archived)[0].values
    assert (values["archived"], values["archived_at"], values["invitable"]) == (True, when(0), False)


def test_an_outage_is_not_a_removal() -> None:
    (outage,) = read("GUILD_DELETE", {"id": G, "unavailable": True})
    (removal,) = read("GUILD_DELETE", {"id": G, "unavailable": False})
    assert outage.values == {"unavailable": True}
    assert removal.values == {"left_at": AT, "unavailable": False}


async def test_rest_snapshots_prove_no_absent_channels() -> None:
    for is_gateway, proven in ((True, {"roles", "channels"}), (False, {"roles"})):
        seen = read_snapshot(GUILD_CREATE, 5, _fail, is_gateway=is_gateway)
        assert {group.table for group in seen.groups} == {"guilds", "roles", "channels", "threads"}
        assert {absence.table for absence in seen.absences} == proven


async def test_a_malformed_part_makes_its_table_incomplete() -> None:
    refused: list[Exception] = []
    payload = GUILD_CREATE | {"roles": [ROLE, {"name": "no id"}, ROLE | {"id": "6", "color": "red"}]}
    seen = read_snapshot(payload, 5, refused.append, is_gateway=True)
    assert len(refused) == 2
    assert {absence.table for absence in seen.absences} == {"channels"}
    assert [group.records[0][1] for group in seen.groups if group.table == "roles"] == [4]


async def test_a_malformed_thread_does_not_cost_its_guild(database: Pool) -> None:
    mirror = unstarted(database)
    mirror.receive("GUILD_CREATE", GUILD_CREATE | {"threads": [THREAD, {"name": "no id"}]}, 0, "s")
    assert mirror.reconciler.guilds.keys() == {GUILD}
    await mirror.stop(5)


JUNK: list[Any] = [
    None,
    [],
    "text",
    7,
    {},
    {"id": None},
    {"id": []},
    {"id": "x", "guild_id": {}},
]


def malformed(event: str) -> float:
    """Return the value of the counter of malformed payloads."""
    return float(metrics.malformed_payloads.labels(event)._value.get())


@pytest.mark.parametrize("event", [*ROW_PARSERS, "READY", "GUILD_CREATE"])
async def test_counts_malformed_payloads_and_fail_raises(database: Pool, event: str) -> None:
    mirror = unstarted(database)
    before = malformed(event)
    listed = [{"user": item, "guild_id": G, "role": item, "meta": item, "guilds": item} for item in JUNK]
    results = [mirror.receive(event, payload, 0, "s") for payload in (*JUNK, *listed)]
    rejected = results.count(None)
    assert malformed(event) - before == rejected
    assert rejected >= 4  # at least those that are not objects
    await mirror.stop(5)


@pytest.mark.parametrize("event", ["GUILD_MEMBERS_CHUNK", "RATE_LIMITED", "SOMETHING_NEW"])
async def test_fail_raises_for_requests_and_unknown_dispatches(database: Pool, event: str) -> None:
    mirror = unstarted(database)
    for payload in JUNK:
        assert mirror.receive(event, payload, 0, "s") in (None, True, False)
    await mirror.stop(5)


async def test_an_infinite_number_is_malformed(database: Pool) -> None:
    before = malformed("GUILD_UPDATE")
    assert unstarted(database).receive("GUILD_UPDATE", decode('{"id": 1e999}'), 0, "s") is None
    assert malformed("GUILD_UPDATE") - before == 1


def unstarted(database: Pool) -> Mirror:
    return Mirror(
        database, DiscordSource(None), Fence("nobody", 1), EventQueue(None, spool="off", max_rows=1_000), shards=1,  # type: ignore[arg-type]
        flush_policy=FlushPolicy(), reconcile_policy=ReconcilePolicy(page_timeout=1.0, cooldown=0),
    )  # fmt: skip


def _fail(error: Exception) -> None:
    raise AssertionError(f"a valid part was rejected: {error}")
