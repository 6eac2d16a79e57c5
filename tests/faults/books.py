"""The books: what was told, what may be missing of it, and whether the tables agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from simulator.remote import SimulatorProcess
from utils.database import Pool
from utils.demo.compare import TABLES, compare

#: Differences named in a verdict.
MOST = 6


@dataclass(slots=True)
class Books:
    """Everything told so far, and the stretches of it that nobody was there to hear."""

    messages: list[tuple[int, int, int]] = field(default_factory=list)
    moves: list[tuple[int, int, str, int | None]] = field(default_factory=list)
    #: From index to index (the second one excluded) of messages and of moves, what may be missing.
    unheard: list[tuple[int, int]] = field(default_factory=list)
    unheard_moves: list[tuple[int, int]] = field(default_factory=list)
    #: Ids of messages that were on disk or committed when a bot was killed: whatever is unheard, these are not.
    kept: set[int] = field(default_factory=set)

    async def read(self, simulator: SimulatorProcess) -> None:
        """Take over what was told since the last time."""
        told = await simulator.call("world.ledger.since", len(self.messages), len(self.moves))
        self.messages += [tuple(it) for it in told["messages"]]
        self.moves += [tuple(it) for it in told["member_events"]]

    async def check(self, database: Pool, simulator: SimulatorProcess) -> list[str]:
        """Compare the tables with the books; return what is wrong, as lines."""
        await self.read(simulator)
        wrong: list[str] = []
        for table in TABLES:
            wrong += (await compare(database, table, await simulator.rows(table))).lines(MOST)
        wrong += await self._messages(database) + await self._moves(database)
        return wrong + await _letters(database) + await _fenced(database)

    async def _messages(self, database: Pool) -> list[str]:
        told = {id: (guild, user) for id, guild, user in self.messages}
        counted = {row["id"] for row in await database.fetch("SELECT id FROM ops.counted_messages")}
        excused = {id for first, last in self.unheard for id, _, _ in self.messages[first:last]} - self.kept
        wrong = [f"message {id} was counted and never told" for id in sorted(counted - told.keys())[:MOST]]
        lost = [id for id in told if id not in counted and id not in excused]
        if lost:
            numbers = [index for index, (id, _, _) in enumerate(self.messages) if id in set(lost)]
            wrong.append(f"{len(lost)} of {len(told)} messages are lost, from number {numbers[0]} to {numbers[-1]}")
        expected = Counter(told[id] for id in counted if id in told)
        rows = await database.fetch("SELECT guild_id, user_id, message_count FROM member_stats")
        found = Counter({(row["guild_id"], row["user_id"]): row["message_count"] for row in rows})
        wrong += [
            f"member {key} has {found[key]} messages, {expected[key]} were counted"
            for key in sorted(expected.keys() | found.keys())
            if expected[key] != found[key]
        ][:MOST]
        return wrong

    async def _moves(self, database: Pool) -> list[str]:
        """Each move that was heard stands there once, live or inferred; what nobody heard may be missing."""
        told = Counter((guild, user, kind) for guild, user, kind, _ in self.moves)
        unheard = Counter(
            (guild, user, kind) for first, last in self.unheard_moves for guild, user, kind, _ in self.moves[first:last]
        )
        rows = await database.fetch("SELECT * FROM member_events ORDER BY guild_id, user_id, stamp, id")
        found = Counter((row["guild_id"], row["user_id"], row["kind"]) for row in rows)
        wrong = [f"{key}: {found[key]} times, was told {told[key]} times" for key in found if found[key] > told[key]]
        wrong += [
            f"{key}: {found[key]} times, was heard {told[key] - unheard[key]} times"
            for key in told
            if found[key] < told[key] - unheard[key]
        ]
        people = [
            key[:2] for key in found.keys() | told.keys() if not told[key] - unheard[key] <= found[key] <= told[key]
        ]
        for guild, user in people[:MOST]:
            stands = [
                (row["kind"], row["inferred"], str(row["at"]), str(row["earliest"]))
                for row in rows
                if (row["guild_id"], row["user_id"]) == (guild, user)
            ]
            wrong.append(f"of {user} in {guild} was told {[it[2:] for it in self.moves if it[:2] == (guild, user)]},")
            wrong.append(f"and there stands {stands}")
        gone = {(guild, user) for guild, user, _ in unheard}
        return wrong[: 3 * MOST] + _doubled(rows, gone)[:MOST]


def _doubled(rows: list[Any], gone: set[tuple[int, int]]) -> list[str]:
    """Of two leaves without a join between them, or two joins at the same moment, one is a double.

    Of those in `gone` something was not heard: a join may have been.
    """
    wrong: list[str] = []
    last: dict[tuple[int, int], str] = {}
    joins: set[tuple[int, int, Any]] = set()
    for row in rows:
        person = row["guild_id"], row["user_id"]
        if row["kind"] == "join":
            if (*person, row["at"]) in joins:
                wrong.append(f"{person} joined twice at {row['at']}")
            joins.add((*person, row["at"]))
        elif row["kind"] == "leave" and last.get(person) == "leave" and person not in gone:
            wrong.append(f"{person} left twice, the second time at {row['at']}")
        if row["kind"] in ("join", "leave"):
            last[person] = row["kind"]
    return wrong


async def _fenced(database: Pool) -> list[str]:
    """Nothing carries an earlier epoch's stamp that was written after the present holder took over.

    Members and threads are left out: a deleted role, a deleted channel change them without a stamp of their own.
    """
    wrong: list[str] = []
    for table in ("guilds", "users", "roles", "channels"):
        written = await database.fetchval(
            f"SELECT count(*) FROM {table} t, ops.leases l"  # noqa: S608 - the names above
            " WHERE t.stamp >> 40 < l.epoch AND t.updated_at > l.taken_at"
        )
        if written:
            wrong.append(f"{written} rows of {table} were written by a process after it had lost the lease")
    return wrong


async def _letters(database: Pool) -> list[str]:
    letters = await database.fetch("SELECT table_name, key, error FROM ops.dead_letters LIMIT $1", MOST)
    return [f"dead letter: {row['table_name']} {row['key']}: {row['error']}" for row in letters]
