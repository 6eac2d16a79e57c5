"""Writes events: joins, leaves and bans, counted messages, and the position that each journal has reached."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from models import DISCORD_EPOCH_MS
from utils.database import Connection
from utils.database.sql import load_statements
from utils.mirror.records.events import Event, Membership, Message
from utils.mirror.records.rows import COUNTER_BITS

_STATEMENTS = load_statements(Path(__file__).with_name("events.sql"))
_COUNT_MESSAGES = _STATEMENTS["count_messages"]
_RECORD_MEMBERSHIPS = _STATEMENTS["record_memberships"]
_UNSETTLED_PEOPLE = _STATEMENTS["unsettled_people"]
_SELECT_HISTORY = _STATEMENTS["select_history"]
_DELETE_EVENTS = _STATEMENTS["delete_events"]
_INSERT_EVENT = _STATEMENTS["insert_event"]
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


# --- histories: joins and leaves alternate

#: A listing may show a leave before the gateway sends it. More than this apart, they are two leaves.
_SAME_LEAVE = timedelta(minutes=1)


class Recorded(NamedTuple):
    """A join or a leave as `member_events` holds it."""

    #: 0: not inserted yet.
    id: int
    kind: str
    at: datetime
    inferred: bool
    earliest: datetime | None
    latest: datetime | None
    stamp: int

    @property
    def known_at(self) -> datetime:
        """When it was received or inferred, on the database's clock."""
        return self.latest or self.at


async def settle_histories(
    connection: Connection, *, written: Iterable[Membership] = (), pending: Iterable[Membership] = ()
) -> None:
    """Make joins and leaves alternate again for the people of whom this transaction has recorded any.

    Call it inside the transaction, after everything that records or infers events. `written` holds the events that it
    was given, repeats included. `pending` holds events that are about to be written: their people are left for then.
    """
    events = list(written)
    guilds, users = [event.guild_id for event in events], [event.user_id for event in events]
    waiting = {(event.guild_id, event.user_id) for event in pending}
    for guild_id, user_id in await connection.fetch(_UNSETTLED_PEOPLE, DISCORD_EPOCH_MS, guilds, users):
        if (guild_id, user_id) in waiting:
            continue
        before = [Recorded(*row) for row in await connection.fetch(_SELECT_HISTORY, guild_id, user_id)]
        after = settle(before)
        same = 0
        last_id = 0
        while same < min(len(before), len(after)) and before[same] == after[same] and before[same].id > last_id:
            last_id = before[same].id
            same += 1
        # What follows is inserted anew, so that ids are in the order of the events.
        await connection.execute(_DELETE_EVENTS, guild_id, [event.id for event in before[same:]])
        for event in after[same:]:
            await connection.execute(_INSERT_EVENT, guild_id, user_id, *event[1:])


def settle(history: Sequence[Recorded]) -> list[Recorded]:
    """Return a person's joins and leaves, oldest first, so that they alternate.

    An inferred event that another one reports is left out, and between two joins or two leaves the other is inferred.
    """
    events = _without_confirmed(history)
    settled: list[Recorded] = []
    for event, following in itertools.zip_longest(events, events[1:]):
        previous = settled[-1] if settled else None
        if previous is None or previous.kind != event.kind:
            settled.append(event)
        elif _is_implied(event, following) or (event.kind == "leave" and event.inferred):
            pass  # the previous one is the same event
        elif event.kind == "leave":
            if previous.inferred and event.known_at - previous.known_at < _SAME_LEAVE:
                settled[-1] = event
            else:
                settled += [_implied(event, since=previous), event]
        elif event.at > previous.at:
            settled += [_implied(event, since=previous), event]
        elif event.at < previous.at:  # a listing showed a later join before the gateway sent this one
            earlier = event._replace(id=0, stamp=previous.stamp)
            settled[-1:] = [earlier, _implied(previous, since=earlier), previous]
    return settled


def _without_confirmed(history: Sequence[Recorded]) -> list[Recorded]:
    """Leave out the inferred joins that an event reports as well, each with the leave that it implied."""
    reported = {event.at for event in history if event.kind == "join" and not event.inferred}
    events: list[Recorded] = []
    for event in history:
        if event.kind == "join" and event.inferred and event.at in reported:
            if events and _is_implied(events[-1], event):
                events.pop()
        else:
            events.append(event)
    return events


def _is_implied(event: Recorded, following: Recorded | None) -> bool:
    """Return whether nothing but the event after it proves an event."""
    return event.inferred and following is not None and following.stamp == event.stamp and following.kind != event.kind


def _implied(event: Recorded, *, since: Recorded) -> Recorded:
    """Return the join or leave that must have happened between two equal events."""
    kind = "leave" if event.kind == "join" else "join"
    return Recorded(0, kind, event.at, True, min(since.known_at, event.known_at), event.latest, event.stamp)
