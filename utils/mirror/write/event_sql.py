"""Events written: members' comings and goings, messages counted, and how far a journal has come."""

from __future__ import annotations

from collections.abc import Sequence

from models import DISCORD_EPOCH_MS
from utils.database import Connection
from utils.mirror.records.events import Event, Membership, Message
from utils.mirror.records.rows import COUNTER_BITS

#: Hours for which the ids of counted messages are kept.
COUNTED_HOURS = 24
#: Ids deleted in one statement, so that none takes long.
PRUNED_AT_ONCE = 10_000
#: A listing may know of a leave before the gateway tells of it; more than this late is another leave.
GATEWAY_LAG = "interval '1 minute'"

#: Counts messages whose ids are new. Parameters: guilds, users, ids. Answers how many were.
COUNT = (
    "WITH given AS MATERIALIZED (SELECT DISTINCT ON (id) * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) "
    "AS g(guild_id, user_id, id) ORDER BY id), "
    "fresh AS (INSERT INTO ops.counted_messages (id) SELECT id FROM given ON CONFLICT (id) DO NOTHING RETURNING id), "
    "tallied AS (SELECT guild_id, user_id, count(*) AS messages, max(id) AS newest "
    "FROM given JOIN fresh USING (id) GROUP BY guild_id, user_id), "
    "counted AS (INSERT INTO member_stats AS s (guild_id, user_id, message_count, last_active_at) "
    f"SELECT guild_id, user_id, messages, to_timestamp(((newest >> 22) + {DISCORD_EPOCH_MS}) / 1000.0) "
    "FROM tallied ORDER BY guild_id, user_id ON CONFLICT (guild_id, user_id) DO UPDATE SET "
    "message_count = s.message_count + excluded.message_count, "
    "last_active_at = greatest(s.last_active_at, excluded.last_active_at)) "
    "SELECT count(*) FROM fresh"
)

_SAME_PERSON = "{0}.guild_id = g.guild_id AND {0}.user_id = g.user_id"
_SAME_CLASS = "({0}.kind IN ('ban', 'unban')) = (g.kind IN ('ban', 'unban'))"
_RELATED = f"{_SAME_PERSON} AND {_SAME_CLASS}"
_EPOCH = f"({{0}}.stamp >> {COUNTER_BITS})"

# Two processes may have heard the same, each at a time of its own. Of a join both know when Discord says it was, and so
# which join a leave comes after or before; only where they share none do the times decide at which they heard it.

#: What the other process that knows the join beside `g` heard beyond that join; 'nothing', or null: it knows none such.
_BEYOND_SHARED_JOIN = (
    f"(SELECT coalesce((SELECT n.kind FROM member_events n WHERE {_RELATED.format('n')} "
    f"AND {_EPOCH.format('n')} = {_EPOCH.format('e')} AND (n.stamp, n.id) {{beyond}} (e.stamp, e.id) "
    "ORDER BY n.stamp {order}, n.id {order} LIMIT 1), 'nothing') "
    f"FROM (SELECT h.kind, h.at FROM given h WHERE {_RELATED.format('h')} AND h.stamp {{near}} g.stamp "
    "ORDER BY h.stamp {back} LIMIT 1) h "
    f"JOIN member_events e ON {_SAME_PERSON.format('e')} AND e.kind = 'join' AND e.at = h.at "
    f"AND {_EPOCH.format('e')} <> {_EPOCH.format('g')} WHERE h.kind = 'join' LIMIT 1)"
)
_AFTER_SHARED_JOIN = _BEYOND_SHARED_JOIN.format(near="<", back="DESC", beyond=">", order="ASC")
_BEFORE_SHARED_JOIN = _BEYOND_SHARED_JOIN.format(near=">", back="ASC", beyond="<", order="DESC")
#: Whether `g` is the last that its process heard of somebody, and the first that a later one did. Null: no later one
#: heard anything at about that time.
_IS_LAST_AND_FIRST = (
    "(SELECT bool_or(n.kind = g.kind "
    f"AND NOT EXISTS (SELECT FROM given h WHERE {_RELATED.format('h')} AND h.stamp > g.stamp)) "
    f"FROM (SELECT DISTINCT ON ({_EPOCH.format('n')}) n.kind, n.latest FROM member_events n "
    f"WHERE {_RELATED.format('n')} AND {_EPOCH.format('n')} > {_EPOCH.format('g')} "
    f"ORDER BY {_EPOCH.format('n')}, n.stamp, n.id) n "
    f"WHERE n.latest BETWEEN g.heard - {GATEWAY_LAG} AND g.heard + {GATEWAY_LAG})"
)
#: The kind of the event before or after `g` of the same person by when it was heard, wherever it stands: in the table,
#: among the given, or elsewhere in the same journal.
_NEIGHBOUR = (
    "SELECT n.kind FROM (SELECT e.kind, e.latest AS at, e.id AS turn FROM member_events e "
    f"WHERE {_RELATED.format('e')} AND e.latest {{known}} g.heard UNION ALL "
    f"SELECT h.kind, h.heard, h.stamp FROM given h WHERE {_RELATED.format('h')} AND h.stamp {{told}} g.stamp) n "
    "ORDER BY n.at {order}, n.turn {order} LIMIT 1"
)
_BEFORE = _NEIGHBOUR.format(known="<=", told="<", order="DESC")
_AFTER = _NEIGHBOUR.format(known=">", told=">", order="ASC")
_WAS_HEARD_TWICE = (
    f"CASE WHEN g.kind = 'leave' AND {_IS_LAST_AND_FIRST} THEN true "
    f"WHEN g.kind = 'leave' AND coalesce({_AFTER_SHARED_JOIN}, {_BEFORE_SHARED_JOIN}) IS NOT NULL "
    f"THEN 'leave' IN ({_AFTER_SHARED_JOIN}, {_BEFORE_SHARED_JOIN}) IS TRUE "
    f"WHEN g.kind = 'leave' AND {_IS_LAST_AND_FIRST} IS NOT NULL THEN false "
    f"ELSE coalesce(({_BEFORE}) = g.kind, false) OR coalesce(({_AFTER}) = g.kind, false) END"
)

#: Writes joins, leaves and bans. A join is known by its time. A leave that a listing has just proven is no second one.
#: What comes from an earlier epoch ($7: the first stamp of this one) may have been heard by two processes. Parameters:
#: guilds, users, kinds, times, stamps, and when they were heard; what has a stamp below $8 or above $9 is there to be
#: compared with, and not written. Answers how many were written.
RECORD = (
    "WITH given AS MATERIALIZED (SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::timestamptz[], "
    "$5::bigint[], $6::timestamptz[]) AS g(guild_id, user_id, kind, at, stamp, heard)), "
    "written AS (INSERT INTO member_events (guild_id, user_id, kind, at, latest, stamp) "
    "SELECT g.guild_id, g.user_id, g.kind, g.at, g.heard, g.stamp FROM given g "
    "WHERE g.stamp BETWEEN $8::bigint AND $9::bigint "
    "AND NOT CASE WHEN g.kind = 'join' THEN "
    f"EXISTS (SELECT FROM member_events e WHERE {_SAME_PERSON.format('e')} AND e.kind = 'join' AND e.at = g.at) "
    f"WHEN g.stamp < $7::bigint THEN {_WAS_HEARD_TWICE} "
    "WHEN g.kind = 'leave' THEN coalesce((SELECT e.kind = 'leave' AND e.inferred "
    f"AND e.latest > g.heard - {GATEWAY_LAG} FROM member_events e "
    f"WHERE {_RELATED.format('e')} ORDER BY e.stamp DESC LIMIT 1), false) "
    "AND NOT EXISTS (SELECT FROM given h "
    f"WHERE {_RELATED.format('h')} AND h.stamp < g.stamp) "
    "ELSE false END ORDER BY g.stamp RETURNING 1) "
    "SELECT count(*) FROM written"
)

#: Parameters: the journal's name, the position.
ADVANCE = (
    "INSERT INTO ops.positions AS p (journal, position) VALUES ($1, $2) ON CONFLICT (journal) DO UPDATE SET "
    "position = excluded.position, updated_at = now() WHERE p.position < excluded.position"
)
POSITION = "SELECT position FROM ops.positions WHERE journal = $1"
FORGET_JOURNAL = "DELETE FROM ops.positions WHERE journal = $1"
#: Parameter: the smallest id to keep. Answers `DELETE n`.
PRUNE = (
    "DELETE FROM ops.counted_messages WHERE id IN "
    f"(SELECT id FROM ops.counted_messages WHERE id < $1 ORDER BY id LIMIT {PRUNED_AT_ONCE})"
)

_LAST_LISTING = (
    "(SELECT max(r.started_at) AS earliest FROM sync_runs r WHERE r.guild_id = a.guild_id AND r.state = 'complete')"
)


#: Whether the last that is known of somebody is that they left: their row may not tell, it waits in another process's
#: buffer that is gone.
_HAS_LEFT = (
    "coalesce((SELECT e.kind = 'leave' FROM member_events e WHERE e.guild_id = a.guild_id AND e.user_id = a.user_id "
    "AND e.kind IN ('join', 'leave') ORDER BY e.stamp DESC, e.id DESC LIMIT 1), false)"
)


def inferred_joins(rows: str) -> str:
    """Return the INSERT for who appeared without a join that anybody heard, or joined anew without a leave.

    `rows` answers guild_id, user_id, joined_at, stamp and rejoined. Before a guild's first complete listing nothing is
    proven: its members were there all along.
    """
    heard = (
        "SELECT FROM member_events e WHERE e.guild_id = a.guild_id AND e.user_id = a.user_id "
        "AND e.kind = 'join' AND e.at = a.joined_at"
    )
    return (
        "INSERT INTO member_events (guild_id, user_id, kind, at, inferred, earliest, latest, stamp) "
        "SELECT a.guild_id, a.user_id, k.kind, coalesce(a.joined_at, now()), true, r.earliest, now(), a.stamp "
        f"FROM ({rows}) a CROSS JOIN LATERAL {_LAST_LISTING} r "
        "CROSS JOIN (VALUES (0, 'leave'), (1, 'join')) AS k(turn, kind) "
        f"WHERE r.earliest IS NOT NULL AND (k.kind = 'join' OR a.rejoined AND NOT {_HAS_LEFT}) "
        f"AND NOT EXISTS ({heard}) "
        "ORDER BY a.guild_id, a.user_id, k.turn"
    )


def inferred_leaves(rows: str, now: str) -> str:
    """Return the INSERT for who is gone without a leave that was heard; `rows` answers guild_id, user_id and stamp."""
    return (
        "INSERT INTO member_events (guild_id, user_id, kind, at, inferred, earliest, latest, stamp) "
        f"SELECT a.guild_id, a.user_id, 'leave', {now}, true, r.earliest, {now}, a.stamp "
        f"FROM ({rows}) a CROSS JOIN LATERAL {_LAST_LISTING} r "
        f"WHERE NOT {_HAS_LEFT}"
    )


async def write_events(
    connection: Connection, events: Sequence[Event], first_stamp: int, beside: Sequence[Membership] = ()
) -> int:
    """Write events, inside a transaction; return how many were new.

    `first_stamp`: the first one of this epoch. `beside`: what else the same journal says of the same people.
    """
    messages = [event for event in events if isinstance(event, Message)]
    memberships = [event for event in events if isinstance(event, Membership)]
    written = 0
    if messages:
        _, guilds, users, ids = zip(*messages, strict=True)
        written += await connection.fetchval(COUNT, guilds, users, ids)
    if memberships:
        first, last = memberships[0].stamp, memberships[-1].stamp
        stamps, guilds, users, kinds, times, heard = zip(*memberships, *beside, strict=True)
        columns = (guilds, users, kinds, times, stamps, heard)
        written += await connection.fetchval(RECORD, *columns, first_stamp, first, last)
    return written
