"""Compare the tables with everything that the simulator sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from simulator.remote import SimulatorProcess
from utils.database import Pool
from utils.demo.compare import TABLES, compare

#: Maximum number of differences of one kind in a result.
MAX_LINES = 6


@dataclass(slots=True)
class Audit:
    """Everything sent so far, and the parts of it that were sent while no bot was connected."""

    messages: list[tuple[int, int, int]] = field(default_factory=list)
    moves: list[tuple[int, int, str, int | None]] = field(default_factory=list)
    #: Half-open index ranges of `messages` and `moves` that may be missing from the tables.
    missed: list[tuple[int, int]] = field(default_factory=list)
    missed_moves: list[tuple[int, int]] = field(default_factory=list)
    #: Ids of messages in a journal when a bot was killed: they must not be missing, even within `missed`.
    journaled: set[int] = field(default_factory=set)

    async def read(self, simulator: SimulatorProcess) -> None:
        """Fetch what was sent since the last call."""
        sent = await simulator.call("world.ledger.since", len(self.messages), len(self.moves))
        self.messages += [tuple(it) for it in sent["messages"]]
        self.moves += [tuple(it) for it in sent["member_events"]]

    async def check(self, pool: Pool, simulator: SimulatorProcess) -> list[str]:
        """Compare the tables with what was sent, and return one line per difference."""
        await self.read(simulator)
        wrong: list[str] = []
        for table in TABLES:
            wrong += (await compare(pool, table, await simulator.rows(table))).lines(MAX_LINES)
        wrong += await self._messages(pool) + await self._moves(pool)
        return wrong + await _dead_letters(pool) + await _unfenced_writes(pool)

    async def _messages(self, pool: Pool) -> list[str]:
        sent = {id: (guild, user) for id, guild, user in self.messages}
        counted = {row["id"] for row in await pool.fetch("SELECT id FROM ops.counted_messages")}
        excused = {id for first, last in self.missed for id, _, _ in self.messages[first:last]} - self.journaled
        wrong = [f"message {id} was counted but never sent" for id in sorted(counted - sent.keys())[:MAX_LINES]]
        lost = {id for id in sent if id not in counted and id not in excused}
        if lost:
            indexes = [index for index, (id, _, _) in enumerate(self.messages) if id in lost]
            wrong.append(f"{len(lost)} of {len(sent)} messages are lost, at indexes {indexes[0]} to {indexes[-1]}")
        expected = Counter(sent[id] for id in counted if id in sent)
        rows = await pool.fetch("SELECT guild_id, user_id, message_count FROM member_stats")
        found = Counter({(row["guild_id"], row["user_id"]): row["message_count"] for row in rows})
        wrong += [
            f"member {key} has message_count {found[key]}, but {expected[key]} messages were counted"
            for key in sorted(expected.keys() | found.keys())
            if expected[key] != found[key]
        ][:MAX_LINES]
        return wrong

    async def _moves(self, pool: Pool) -> list[str]:
        """Check that each delivered move has one row, live or inferred. Rows of missed moves are optional."""
        sent = Counter((guild, user, kind) for guild, user, kind, _ in self.moves)
        missed = Counter(
            (guild, user, kind) for first, last in self.missed_moves for guild, user, kind, _ in self.moves[first:last]
        )
        rows = await pool.fetch("SELECT * FROM member_events ORDER BY guild_id, user_id, stamp, id")
        found = Counter((row["guild_id"], row["user_id"], row["kind"]) for row in rows)
        wrong = [f"{key}: {found[key]} rows, sent {sent[key]} times" for key in found if found[key] > sent[key]]
        wrong += [
            f"{key}: {found[key]} rows, delivered {sent[key] - missed[key]} times"
            for key in sent
            if found[key] < sent[key] - missed[key]
        ]
        people = [
            key[:2] for key in found.keys() | sent.keys() if not sent[key] - missed[key] <= found[key] <= sent[key]
        ]
        for guild, user in people[:MAX_LINES]:
            stored = [
                (row["kind"], row["inferred"], str(row["at"]), str(row["earliest"]))
                for row in rows
                if (row["guild_id"], row["user_id"]) == (guild, user)
            ]
            wrong.append(
                f"sent of user {user} in guild {guild}: {[it[2:] for it in self.moves if it[:2] == (guild, user)]}"
            )
            wrong.append(f"stored: {stored}")
        incomplete = {(guild, user) for guild, user, _ in missed}
        return wrong[: 3 * MAX_LINES] + _duplicates(rows, incomplete)[:MAX_LINES]


def _duplicates(rows: list[Any], incomplete: set[tuple[int, int]]) -> list[str]:
    """Report two leaves without a join between them, and two joins at the same time.

    For members in `incomplete` a missed join may explain two leaves.
    """
    wrong: list[str] = []
    last: dict[tuple[int, int], str] = {}
    joins: set[tuple[int, int, Any]] = set()
    for row in rows:
        member = row["guild_id"], row["user_id"]
        if row["kind"] == "join":
            if (*member, row["at"]) in joins:
                wrong.append(f"{member} joined twice at {row['at']}")
            joins.add((*member, row["at"]))
        elif row["kind"] == "leave" and last.get(member) == "leave" and member not in incomplete:
            wrong.append(f"{member} left twice, the second time at {row['at']}")
        if row["kind"] in ("join", "leave"):
            last[member] = row["kind"]
    return wrong


async def _unfenced_writes(pool: Pool) -> list[str]:
    """Report rows with an earlier epoch's stamp that were written after the present holder took over.

    Members and threads are left out: deleting a role or a channel changes them without a new stamp.
    """
    wrong: list[str] = []
    for table in ("guilds", "users", "roles", "channels"):
        written = await pool.fetchval(
            f"SELECT count(*) FROM {table} t, ops.leases l"  # noqa: S608 - the names above
            " WHERE t.stamp >> 40 < l.epoch AND t.updated_at > l.taken_at"
        )
        if written:
            wrong.append(f"{written} rows of {table} were written by a process after it had lost the lease")
    return wrong


async def _dead_letters(pool: Pool) -> list[str]:
    rows = await pool.fetch("SELECT table_name, key, error FROM ops.dead_letters LIMIT $1", MAX_LINES)
    return [f"dead letter: {row['table_name']} {row['key']}: {row['error']}" for row in rows]
