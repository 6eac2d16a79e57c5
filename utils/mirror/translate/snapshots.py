"""Parses GUILD_CREATE into one observation: the guild, its roles and channels, and its active threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from utils.mirror.records.rows import Absence, Entry, Key, Observation, Row, group_entries
from utils.mirror.records.validation import validate_row
from utils.mirror.translate import objects
from utils.mirror.translate.objects import MALFORMED, Payload


def read_snapshot(
    payload: Payload, stamp: int, on_malformed: Callable[[Exception], None], *, is_gateway: bool
) -> Observation:
    """Translate a guild's payload.

    A gateway payload lists every channel. A REST payload omits the channels that are hidden from the bot, so a channel
    missing there may still exist. A malformed part is reported to `on_malformed` and skipped; its table's listing then
    counts as incomplete.
    """
    guild_id = int(payload["id"])
    rows = [validate_row(objects.guild(payload, is_complete=is_gateway))]
    absences = []
    for table, parse, lists_all in (
        ("roles", objects.role, True),
        ("channels", objects.channel, is_gateway),
        ("threads", objects.thread, False),
    ):
        if table not in payload:
            continue
        found, is_complete = _parse_all(guild_id, payload[table], parse, on_malformed)
        rows += found
        if lists_all and is_complete:
            absences.append(Absence(table, guild_id, stamp, {row.key[-1] for row in found}))
    entries: dict[tuple[str, Key], Entry] = {
        (row.table, row.key): Entry(row.values, row.may_insert, stamp) for row in rows
    }
    return Observation(guild_id, stamp, list(group_entries(entries.items())), absences)


def _parse_all(
    guild_id: int,
    payloads: Iterable[Payload],
    parse: Callable[[int, Payload], Row],
    on_malformed: Callable[[Exception], None],
) -> tuple[list[Row], bool]:
    rows, is_complete = [], True
    for payload in payloads:
        try:
            rows.append(validate_row(parse(guild_id, payload)))
        except MALFORMED as error:
            is_complete = False
            on_malformed(error)
    return rows, is_complete
