"""What a statement reads and writes, by its text and the catalogue."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

from utils.database.cache.catalog import Action, Catalog
from utils.database.cache.tokens import Judgement, Token, parsable, shortened, tokens_of

#: Characters of a text that is still parsed: it takes up to 4 µs for each, and the event loop waits.
LONGEST = 8_000

_NOTHING: frozenset[str] = frozenset()
#: First words of what writes no table, whatever follows.
_HARMLESS = frozenset({
    "begin", "start", "commit", "end", "rollback", "abort", "savepoint", "release", "set", "reset", "show", "discard",
    "listen", "unlisten", "notify", "deallocate", "close", "fetch", "move", "checkpoint", "lock", "analyze", "vacuum",
    "cluster", "reindex", "comment",
})  # fmt: skip
_QUERIES = frozenset({"select", "with", "table", "values", "("})
_CHANGES = frozenset({"insert", "update", "delete", "merge", "truncate"})


@dataclass(frozen=True, slots=True)
class Statement:
    """What one text reads and writes; tables as "schema.table"."""

    #: None: cannot be told.
    reads: frozenset[str] | None
    #: None: cannot be told, so that everything may have been written; empty: nothing.
    writes: frozenset[str] | None
    is_cacheable: bool


UNKNOWN = Statement(None, None, False)


@cache
def parser() -> Any:
    """Import sqlglot, which takes a tenth of a second: in a thread, before the first statement is analysed."""
    import sqlglot

    logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # what it cannot parse is no news here
    return sqlglot


def analyse(sql: str, catalogue: Catalog) -> Statement:
    """Find out what a text reads and writes; a text of more than `LONGEST` characters cannot be told."""
    sql = shortened(sql)
    if len(sql) > LONGEST:
        return UNKNOWN
    tokens = tokens_of(sql)
    while tokens and tokens[-1].text == ";":
        tokens.pop()
    if not tokens:
        return Statement(_NOTHING, _NOTHING, False)
    words = {token.text for token in tokens if token.kind == "word"}
    judgement = catalogue.words.judge(tokens)
    if ";" in {token.text for token in tokens if token.kind == "sign"}:
        return UNKNOWN
    first = tokens[0].text
    if first in _HARMLESS:
        return Statement(None, _NOTHING, False)
    if first == "explain":
        runs = "analyze" in words and (judgement.may_write or not words.isdisjoint(_CHANGES | {"into", "create"}))
        return Statement(None, None if runs else _NOTHING, False)
    if first == "refresh":
        return Statement(None, _refreshed(tokens, catalogue), False)
    if first in _QUERIES or first in _CHANGES:
        return _parsed(tokens, words, judgement, catalogue)
    return UNKNOWN


def _parsed(tokens: list[Token], words: set[str], judgement: Judgement, catalogue: Catalog) -> Statement:
    sqlglot = parser()
    try:
        trees = sqlglot.parse(parsable(tokens), dialect="postgres")
    except Exception:  # its own errors, and whatever else a text that nobody foresaw makes of it
        trees = []
    exp = sqlglot.exp
    if len(trees) != 1 or trees[0] is None or isinstance(trees[0], exp.Command):
        is_query = tokens[0].text in _QUERIES and words.isdisjoint(_CHANGES | {"into"}) and not judgement.may_write
        return Statement(None, _NOTHING if is_query else None, False)
    tree = trees[0]
    ctes = {_name(cte.args["alias"].this) for cte in tree.find_all(exp.CTE) if cte.args.get("alias")}
    reads: set[int] | None = set()
    for table in tree.find_all(exp.Table):
        if not isinstance(table.this, exp.Identifier):
            continue  # a function in FROM: its name was among the words
        oid = _find(table, catalogue)
        if oid is not None:
            if reads is not None:
                reads.add(oid)
        elif table.args.get("db") is not None or _name(table.this) not in ctes:
            reads = None
    told = catalogue.read(reads) if reads is not None else None
    writes = None if judgement.may_write else _written(tree, catalogue)
    plain = isinstance(tree, exp.Query | exp.Values) and not any(True for _ in tree.find_all(exp.Lock, exp.TableSample))
    return Statement(told, writes, plain and judgement.is_steady and told is not None and writes == _NOTHING)


def _written(tree: Any, catalogue: Catalog) -> frozenset[str] | None:
    exp = parser().exp
    written: set[str] = set()
    for node in tree.find_all(exp.Insert, exp.Update, exp.Delete, exp.Merge, exp.TruncateTable, exp.Into):
        if isinstance(node.parent, exp.When):
            continue  # a branch of MERGE, which counts as a whole
        actions: tuple[Action, ...] = ("UPDATE",)
        cascades = False
        tables = [node.this]
        if isinstance(node, exp.Into):
            return None  # SELECT … INTO makes a table
        if isinstance(node, exp.TruncateTable):
            tables, actions = node.expressions, ("TRUNCATE",)
            cascades = str(node.args.get("option") or "").upper() == "CASCADE"
        elif isinstance(node, exp.Insert):
            actions = ("INSERT", "UPDATE") if node.args.get("conflict") else ("INSERT",)
        elif isinstance(node, exp.Merge):
            actions = ("INSERT", "UPDATE", "DELETE")
        elif isinstance(node, exp.Delete):
            actions = ("DELETE",)
        oids = [_find(table.this if isinstance(table, exp.Schema) else table, catalogue) for table in tables]
        for action in actions:
            more = catalogue.written([oid for oid in oids if oid is not None], action, cascades=cascades)
            if more is None or None in oids:
                return None
            written.update(more)
    return frozenset(written)


def _refreshed(tokens: list[Token], catalogue: Catalog) -> frozenset[str] | None:
    """REFRESH MATERIALIZED VIEW [CONCURRENTLY] [schema.]name [WITH [NO] DATA]."""
    rest = tokens[4 if len(tokens) > 3 and tokens[3].text == "concurrently" else 3 :]
    names = [token.name for token in rest[:3]]
    if not names or names[0] is None:
        return None
    is_qualified = len(rest) > 2 and rest[1].text == "."
    oid = catalogue.find(names[0], names[2] or "") if is_qualified else catalogue.find(None, names[0])
    return None if oid is None else catalogue.written([oid], "TRUNCATE")


def _find(table: Any, catalogue: Catalog) -> int | None:
    if not isinstance(table, parser().exp.Table) or table.args.get("catalog") is not None:
        return None
    schema = table.args.get("db")
    return catalogue.find(None if schema is None else _name(schema), _name(table.this))


def _name(identifier: Any) -> str:
    name = str(identifier.this)
    return name if identifier.args.get("quoted") else name.lower()
