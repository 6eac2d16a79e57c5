"""What a statement reads and writes, according to its text and the catalog.

Inference is for statements without tags (`reads=`, `writes=`). It need not understand everything: what it cannot tell
is not cached, and flushes the cache.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

from utils.database.cache.catalog import Catalog
from utils.database.cache.tokens import Effects, Token, shorten_values, to_parsable, tokenize
from utils.database.statements import Action

#: Longer texts are not parsed: parsing takes up to 4 µs a character and holds the event loop.
MAX_LENGTH = 8_000

_NOTHING: frozenset[str] = frozenset()
#: First words of statements that write no table, whatever follows.
_HARMLESS = frozenset({
    "begin", "start", "commit", "end", "rollback", "abort", "savepoint", "release", "set", "reset", "show", "discard",
    "listen", "unlisten", "notify", "deallocate", "close", "fetch", "move", "checkpoint", "lock", "analyze", "vacuum",
    "cluster", "reindex", "comment",
})  # fmt: skip
_QUERIES = frozenset({"select", "with", "table", "values", "("})
_CHANGES = frozenset({"insert", "update", "delete", "merge", "truncate"})


@dataclass(frozen=True, slots=True)
class Statement:
    """The tables that a statement reads and writes, as "schema.table"."""

    #: None: unknown.
    reads: frozenset[str] | None
    #: None: unknown, so anything may be written; empty: nothing.
    writes: frozenset[str] | None
    is_cacheable: bool


UNKNOWN = Statement(None, None, False)


@cache
def parser() -> Any:
    """Import sqlglot. It takes 0.1 s: call it in a thread before the first statement is analysed."""
    import sqlglot

    logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # unparsable statements are expected
    return sqlglot


def analyse(sql: str, catalog: Catalog) -> Statement:
    """Return what a text reads and writes; `UNKNOWN` for more than `MAX_LENGTH` characters."""
    sql = shorten_values(sql)
    if len(sql) > MAX_LENGTH:
        return UNKNOWN
    tokens = tokenize(sql)
    while tokens and tokens[-1].text == ";":
        tokens.pop()
    if not tokens:
        return Statement(_NOTHING, _NOTHING, False)
    words = {token.text for token in tokens if token.kind == "word"}
    effects = catalog.functions.effects_of(tokens)
    if ";" in {token.text for token in tokens if token.kind == "sign"}:
        return UNKNOWN
    first = tokens[0].text
    if first in _HARMLESS:
        return Statement(None, _NOTHING, False)
    if first == "explain":
        return Statement(None, None if "analyze" in words else _NOTHING, False)
    if first == "refresh":
        return Statement(None, _refreshed(tokens, catalog), False)
    if first in _QUERIES or first in _CHANGES:
        return _parsed(tokens, words, effects, catalog)
    return UNKNOWN


def is_query(sql: str) -> bool:
    """Return whether a text is one query, judged by its tokens alone: it may call any function, but changes no rows."""
    tokens = tokenize(sql)
    while tokens and tokens[-1].text == ";":
        tokens.pop()
    if not tokens or tokens[0].text not in _QUERIES:
        return False
    words = {token.text for token in tokens if token.kind == "word"}
    signs = {token.text for token in tokens if token.kind == "sign"}
    # "update" also appears in FOR UPDATE, whose result must not be cached either.
    return ";" not in signs and words.isdisjoint(_CHANGES | {"into"})


def _parsed(tokens: list[Token], words: set[str], effects: Effects, catalog: Catalog) -> Statement:
    sqlglot = parser()
    try:
        trees = sqlglot.parse(to_parsable(tokens), dialect="postgres")
    except Exception:  # its own errors, and whatever else it raises for a text that it does not expect
        trees = []
    exp = sqlglot.exp
    if len(trees) != 1 or trees[0] is None or isinstance(trees[0], exp.Command):
        is_query = tokens[0].text in _QUERIES and words.isdisjoint(_CHANGES | {"into"}) and not effects.may_write
        return Statement(None, _NOTHING if is_query else None, False)
    tree = trees[0]
    ctes = {_name(cte.args["alias"].this) for cte in tree.find_all(exp.CTE) if cte.args.get("alias")}
    reads: set[int] | None = set()
    for table in tree.find_all(exp.Table):
        if not isinstance(table.this, exp.Identifier):
            continue  # a function in FROM, which `effects` covers
        oid = _find(table, catalog)
        if oid is not None:
            if reads is not None:
                reads.add(oid)
        elif table.args.get("db") is not None or _name(table.this) not in ctes:
            reads = None
    tables = catalog.tables_read(reads) if reads is not None else None
    writes = None if effects.may_write else _written(tree, catalog)
    plain = isinstance(tree, exp.Query | exp.Values) and not any(True for _ in tree.find_all(exp.Lock, exp.TableSample))
    is_cacheable = plain and effects.is_deterministic and tables is not None and writes == _NOTHING
    return Statement(tables, writes, is_cacheable)


def _written(tree: Any, catalog: Catalog) -> frozenset[str] | None:
    exp = parser().exp
    written: set[str] = set()
    for node in tree.find_all(exp.Insert, exp.Update, exp.Delete, exp.Merge, exp.TruncateTable, exp.Into):
        if isinstance(node.parent, exp.When):
            continue  # a branch of MERGE, which is handled as a whole
        actions: tuple[Action, ...] = ("UPDATE",)
        tables = [node.this]
        if isinstance(node, exp.Into) or node.args.get("option"):
            return None  # SELECT … INTO creates a table; TRUNCATE … CASCADE
        if isinstance(node, exp.TruncateTable):
            tables, actions = node.expressions, ("TRUNCATE",)
        elif isinstance(node, exp.Insert):
            actions = ("INSERT", "UPDATE") if node.args.get("conflict") else ("INSERT",)
        elif isinstance(node, exp.Merge):
            actions = ("INSERT", "UPDATE", "DELETE")
        elif isinstance(node, exp.Delete):
            actions = ("DELETE",)
        oids = [_find(table.this if isinstance(table, exp.Schema) else table, catalog) for table in tables]
        for action in actions:
            more = catalog.tables_written([oid for oid in oids if oid is not None], action)
            if more is None or None in oids:
                return None
            written.update(more)
    return frozenset(written)


def _refreshed(tokens: list[Token], catalog: Catalog) -> frozenset[str] | None:
    """Return what REFRESH MATERIALIZED VIEW [CONCURRENTLY] [schema.]name [WITH [NO] DATA] writes."""
    rest = tokens[4 if len(tokens) > 3 and tokens[3].text == "concurrently" else 3 :]
    names = [token.name for token in rest[:3]]
    if not names or names[0] is None:
        return None
    is_qualified = len(rest) > 2 and rest[1].text == "."
    oid = catalog.find(names[0], names[2] or "") if is_qualified else catalog.find(None, names[0])
    return None if oid is None else catalog.tables_written([oid], "TRUNCATE")


def _find(table: Any, catalog: Catalog) -> int | None:
    if not isinstance(table, parser().exp.Table) or table.args.get("catalog") is not None:
        return None
    schema = table.args.get("db")
    return catalog.find(None if schema is None else _name(schema), _name(table.this))


def _name(identifier: Any) -> str:
    name = str(identifier.this)
    return name if identifier.args.get("quoted") else name.lower()
