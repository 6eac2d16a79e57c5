"""GUILD_CREATE turned into one observation: the guild, all its roles and channels, and its active threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from utils.mirror.records.rows import Absence, Entry, Key, Observation, Row, grouped, value_columns
from utils.mirror.records.validation import require
from utils.mirror.translate import objects
from utils.mirror.translate.objects import MISSHAPEN, Payload


def checked(row: Row) -> Row:
    """Return the row; `ValidationError` when its table cannot hold it."""
    names = tuple(name for name in value_columns(row.table) if name in row.values)
    require(row.table, names, (*row.key, *(row.values[name] for name in names)))
    return row


def snapshot(payload: Payload, stamp: int, refuse: Callable[[Exception], None], *, is_gateway: bool) -> Observation:
    """Return what a guild's payload shows.

    From the gateway it names every channel, hidden ones included; over REST the hidden ones are left out, so that
    there absence proves nothing. A part that cannot be understood costs that part alone, and then nothing is taken
    for absent.
    """
    guild_id = int(payload["id"])
    rows = [checked(objects.guild(payload, whole=is_gateway))]
    absences = []
    for name, table, read, proves in (
        ("roles", "roles", objects.role, True),
        ("channels", "channels", objects.channel, is_gateway),
        ("threads", "threads", objects.thread, False),
    ):
        if name not in payload:
            continue
        found, whole = _read_all(guild_id, payload[name], read, refuse)
        rows += found
        if proves and whole:
            absences.append(Absence(table, guild_id, stamp, {row.key[-1] for row in found}))
    entries: dict[tuple[str, Key], Entry] = {
        (row.table, row.key): Entry(row.values, row.appears, stamp) for row in rows
    }
    return Observation(guild_id, stamp, list(grouped(entries.items())), absences)


def _read_all(
    guild_id: int,
    payloads: Iterable[Payload],
    read: Callable[[int, Payload], Row],
    refuse: Callable[[Exception], None],
) -> tuple[list[Row], bool]:
    rows, whole = [], True
    for payload in payloads:
        try:
            rows.append(checked(read(guild_id, payload)))
        except MISSHAPEN as error:
            whole = False
            refuse(error)
    return rows, whole
