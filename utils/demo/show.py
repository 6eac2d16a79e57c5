"""What the demo prints: tables of rows and the history in words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import asyncpg
from rich.table import Table
from rich.text import Text

from utils.database import Pool
from utils.demo.proof import TABLES, Proof

#: Lines of history.
HISTORY = 14
#: Longest value shown, and most columns of one change.
LENGTH = 28
COLUMNS = 2

_COUNTS = """
SELECT g.id, g.name,
  (SELECT count(*) FROM members AS t WHERE t.guild_id = g.id AND t.left_at IS NULL) AS members,
  (SELECT count(*) FROM members AS t WHERE t.guild_id = g.id AND t.left_at IS NOT NULL) AS left,
  (SELECT count(*) FROM roles AS t WHERE t.guild_id = g.id AND t.deleted_at IS NULL) AS roles,
  (SELECT count(*) FROM channels AS t WHERE t.guild_id = g.id AND t.deleted_at IS NULL) AS channels,
  (SELECT count(*) FROM threads AS t WHERE t.guild_id = g.id AND t.deleted_at IS NULL) AS threads,
  (SELECT count(*) FROM changes AS t WHERE t.guild_id = g.id) AS changes
FROM guilds AS g ORDER BY members DESC
"""
_HISTORY = """
WITH told AS (
  SELECT id, guild_id, table_name, key, action, user_id, before, after, at FROM changes
  UNION ALL
  SELECT id, NULL, table_name, key, action, user_id, before, after, at FROM user_changes
), numbered AS (
  SELECT *, row_number() OVER (
    PARTITION BY table_name, action, CASE WHEN action = 'update' THEN
      (SELECT string_agg(k, ',' ORDER BY k) FROM jsonb_object_keys(after) AS k) END
    ORDER BY md5(id::text)) AS nth
  FROM told WHERE action <> 'update' OR after <> '{}'
)
SELECT t.id, t.at, t.table_name, t.action, t.before, t.after, g.name AS guild,
  coalesce(u.global_name, u.username) AS person,
  coalesce(r.name, c.name, h.name) AS thing
FROM numbered AS t
LEFT JOIN guilds AS g ON g.id = t.guild_id
LEFT JOIN users AS u ON u.id = t.user_id
LEFT JOIN roles AS r ON t.table_name = 'roles' AND r.guild_id = t.guild_id AND r.id = (t.key->>'id')::bigint
LEFT JOIN channels AS c ON t.table_name = 'channels' AND c.guild_id = t.guild_id AND c.id = (t.key->>'id')::bigint
LEFT JOIN threads AS h ON t.table_name = 'threads' AND h.guild_id = t.guild_id AND h.id = (t.key->>'id')::bigint
ORDER BY t.nth, t.action = 'update', md5(t.id::text) LIMIT $1
"""
_LOOKS: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "dim"}
_HASH = re.compile(r"(a_)?[0-9a-f]{32}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d")
#: Unicode's control, format, surrogate and private signs, and its separators of lines.
_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))


def plain(value: object) -> str:
    """Return a value as text that does nothing to the terminal: people's names hold what turns lines around."""
    if value is None:
        return "nothing"
    if value == "":
        return "''"
    if isinstance(value, list):
        return f"{len(value)} of them"
    text = str(value)
    if _HASH.fullmatch(text):
        text = f"{text[:8]}…"
    elif _TIME.match(text):
        text = text[:16].replace("T", " ")
    shown = "".join(f"\\u{ord(sign):04x}" if unicodedata.category(sign) in _UNSEEN else sign for sign in text)
    return shown if len(shown) <= LENGTH else f"{shown[: LENGTH - 1]}…"


async def contents(db: Pool) -> Table:
    """Return how many rows each guild has in each table."""
    table = Table(**_LOOKS)
    table.add_column("guild")
    columns = ("members", "left", "roles", "channels", "threads", "changes")
    for column in columns:
        table.add_column(column, justify="right")
    for row in await db.fetch(_COUNTS):
        table.add_row(Text(plain(row["name"])), *(f"{row[column]:,}" for column in columns))
    users = await db.fetchval("SELECT count(*) FROM users")
    table.add_row(f"and {users:,} users", style="dim")
    return table


async def history(db: Pool) -> Table:
    """Return some lines of the history, of as many kinds as there are."""
    table = Table(**_LOOKS)
    for column, width in (("at (UTC)", 8), ("where", 16), ("what", 24), ("change", 0)):
        table.add_column(column, no_wrap=True, min_width=width)
    roles = {row["id"]: plain(row["name"]) for row in await db.fetch("SELECT id, name FROM roles")}
    rows = await db.fetch(_HISTORY, HISTORY)
    for row in sorted(rows, key=lambda row: int(row["id"])):
        change = _change(row, roles)
        table.add_row(
            f"{row['at']:%H:%M:%S}", Text(plain(row["guild"] or "everywhere")), Text(_what(row)), Text(change)
        )
    return table


def _what(row: asyncpg.Record) -> str:
    table = row["table_name"]
    if table in ("members", "users"):
        return plain(row["person"])
    return "the guild" if table == "guilds" else f"{table[:-1]} {plain(row['thing'])}"


def _change(row: asyncpg.Record, roles: Mapping[int, str]) -> str:
    action = row["action"]
    if action != "update":
        words = {"remove": "left", "return": "came back"} if row["table_name"] == "members" else {}
        return words.get(action, {"remove": "deleted", "return": "there again"}[action])
    before, after = row["before"] or {}, row["after"] or {}
    told = []
    for name, value in list(after.items())[:COLUMNS]:
        if name == "roles":
            lost, given = set(before.get(name) or ()) - set(value), set(value) - set(before.get(name) or ())
            signs = [f"+{roles.get(id, id)}" for id in sorted(given)] + [f"-{roles.get(id, id)}" for id in sorted(lost)]
            told.append(f"roles: {' '.join(signs)}")
        else:
            told.append(f"{name}: {plain(before.get(name))} → {plain(value)}")
    return ", ".join(told) + (f", and {len(after) - COLUMNS} more" if len(after) > COLUMNS else "")


def proofs(found: list[Proof]) -> Table:
    """Return what the comparison came to, a line a table."""
    table = Table(show_header=False, **_LOOKS)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    for proof in sorted(found, key=lambda proof: TABLES.index(proof.table)):
        style = "green" if not proof.differences else "bold red"
        table.add_row(
            f"{proof.compared:,}", f"{proof.table} compared", Text(f"{proof.differences:,} differences", style)
        )
    return table
