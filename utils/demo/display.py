"""Tables that the demo prints: row counts, history and comparison results."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import asyncpg
from rich.table import Table
from rich.text import Text

from utils.database import Pool
from utils.demo.compare import TABLES, Comparison

#: Number of lines of history.
HISTORY = 14
#: Maximum length of a value, and maximum number of columns of a change.
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
WITH history AS (
  SELECT id, guild_id, table_name, key, action, user_id, before, after, at FROM changes
  UNION ALL
  SELECT id, NULL, table_name, key, action, user_id, before, after, at FROM user_changes
), numbered AS (
  SELECT *, row_number() OVER (
    PARTITION BY table_name, action, CASE WHEN action = 'update' THEN
      (SELECT string_agg(k, ',' ORDER BY k) FROM jsonb_object_keys(after) AS k) END
    ORDER BY md5(id::text)) AS nth
  FROM history WHERE action <> 'update' OR after <> '{}'
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
_TABLE_STYLE: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "dim"}
_HASH = re.compile(r"(a_)?[0-9a-f]{32}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d")
#: Unicode categories of control, format, surrogate and private-use characters, and line separators.
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))


def plain(value: object) -> str:
    """Format a value as text that is safe for the terminal: names can contain control and bidi characters."""
    if value is None:
        return "none"
    if value == "":
        return "''"
    if isinstance(value, list):
        return f"{len(value)} items"
    text = str(value)
    if _HASH.fullmatch(text):
        text = f"{text[:8]}…"
    elif _TIME.match(text):
        text = text[:16].replace("T", " ")
    shown = "".join(f"\\u{ord(char):04x}" if unicodedata.category(char) in _INVISIBLE else char for char in text)
    return shown if len(shown) <= LENGTH else f"{shown[: LENGTH - 1]}…"


async def contents(pool: Pool) -> Table:
    """Return the number of rows of each guild in each table."""
    table = Table(**_TABLE_STYLE)
    table.add_column("guild")
    columns = ("members", "left", "roles", "channels", "threads", "changes")
    for column in columns:
        table.add_column(column, justify="right")
    for row in await pool.fetch(_COUNTS):
        table.add_row(Text(plain(row["name"])), *(f"{row[column]:,}" for column in columns))
    users = await pool.fetchval("SELECT count(*) FROM users")
    table.add_row(f"plus {users:,} users", style="dim")
    return table


async def history(pool: Pool) -> Table:
    """Return a sample of the history with as many kinds of changes as possible."""
    table = Table(**_TABLE_STYLE)
    for column, width in (("at (UTC)", 8), ("where", 16), ("what", 24), ("change", 0)):
        table.add_column(column, no_wrap=True, min_width=width)
    roles = {row["id"]: plain(row["name"]) for row in await pool.fetch("SELECT id, name FROM roles")}
    rows = await pool.fetch(_HISTORY, HISTORY)
    for row in sorted(rows, key=lambda row: int(row["id"])):
        change = _change(row, roles)
        table.add_row(
            f"{row['at']:%H:%M:%S}", Text(plain(row["guild"] or "all guilds")), Text(_what(row)), Text(change)
        )
    return table


def _what(row: asyncpg.Record) -> str:
    table = row["table_name"]
    if table in ("members", "users"):
        return plain(row["person"])
    return "guild" if table == "guilds" else f"{table[:-1]} {plain(row['thing'])}"


def _change(row: asyncpg.Record, roles: Mapping[int, str]) -> str:
    action = row["action"]
    if action != "update":
        labels = {"remove": "left", "return": "rejoined"} if row["table_name"] == "members" else {}
        usual = {"create": "created", "remove": "deleted", "return": "restored"}
        return labels.get(action) or usual.get(action, action)
    before, after = row["before"] or {}, row["after"] or {}
    parts = []
    for name, value in list(after.items())[:COLUMNS]:
        if name == "roles":
            removed, added = set(before.get(name) or ()) - set(value), set(value) - set(before.get(name) or ())
            signs = [f"+{roles.get(id, id)}" for id in sorted(added)] + [
                f"-{roles.get(id, id)}" for id in sorted(removed)
            ]
            parts.append(f"roles: {' '.join(signs)}")
        else:
            parts.append(f"{name}: {plain(before.get(name))} → {plain(value)}")
    return ", ".join(parts) + (f", and {len(after) - COLUMNS} more" if len(after) > COLUMNS else "")


def comparisons(results: list[Comparison]) -> Table:
    """Return the results of the comparison, one line per table."""
    table = Table(show_header=False, **_TABLE_STYLE)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    for result in sorted(results, key=lambda result: TABLES.index(result.table)):
        style = "green" if not result.differences else "bold red"
        table.add_row(
            f"{result.compared:,}", f"{result.table} compared", Text(f"{result.differences:,} differences", style)
        )
    return table
