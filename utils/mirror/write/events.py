"""Writes events: joins, leaves and bans, counted messages, and the position that each journal has reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models import DISCORD_EPOCH_MS
from utils.database import Connection
from utils.database.sql import load_statements
from utils.mirror.records.events import Event, Membership, Message
from utils.mirror.records.rows import COUNTER_BITS

_STATEMENTS = load_statements(Path(__file__).with_name("events.sql"))
_COUNT_MESSAGES = _STATEMENTS["count_messages"]
_RECORD_MEMBERSHIPS = _STATEMENTS["record_memberships"]
#: Parameters: journal, position.
ADVANCE_POSITION = _STATEMENTS["advance_position"]
#: Parameter: journal.
SELECT_POSITION = _STATEMENTS["select_position"]
#: Parameter: journal.
DELETE_POSITION = _STATEMENTS["delete_position"]
#: Parameters: the smallest id to keep, how many ids to delete at most.
PRUNE_COUNTED_MESSAGES = _STATEMENTS["prune_counted_messages"]


async def write_events(
    connection: Connection, events: Sequence[Event], first_stamp: int, context: Sequence[Membership] = ()
) -> int:
    """Write events inside a transaction and return how many were new.

    `first_stamp` is the first stamp of the current lease epoch. `context` holds the other joins, leaves and bans that
    the same journal has of these people; they are compared with, not written.
    """
    messages = [event for event in events if isinstance(event, Message)]
    memberships = [event for event in events if isinstance(event, Membership)]
    written = 0
    if messages:
        _, guilds, users, ids = zip(*messages, strict=True)
        written += await connection.fetchval(_COUNT_MESSAGES, guilds, users, ids, DISCORD_EPOCH_MS)
    if memberships:
        first, last = memberships[0].stamp, memberships[-1].stamp
        stamps, guilds, users, kinds, times, received = zip(*memberships, *context, strict=True)
        columns = (guilds, users, kinds, times, stamps, received)
        written += await connection.fetchval(_RECORD_MEMBERSHIPS, *columns, first_stamp, first, last, COUNTER_BITS)
    return written
