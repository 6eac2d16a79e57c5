"""What Alembic compares with a database: the modules that declare tables, and which tables are whose."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, MetaData, text

import models
from models import Base
from utils import packs
from utils.database import ownership
from utils.database.ownership import SCRIPTS
from utils.database.placement import OPS
from utils.exceptions import MigrationError
from utils.packs import Pack

#: Schemas with our tables, as the models spell them. Others are not compared.
SCHEMAS = (None, OPS)
_ROOT = Path(__file__).resolve().parents[3]
COGS = _ROOT / "cogs"
MODELS = Path(models.__file__).parent

_DECLARES_TABLE = re.compile(r"^\s+__tablename__\s*[:=]", re.MULTILINE)


def import_models(cogs: Path = COGS, folder: Path = MODELS, *, scripts: Path = SCRIPTS) -> None:
    """Import every module that declares tables: all of `models/`, and the cogs with a `__tablename__`.

    Folders in `models/` count with and without an `__init__.py`. Given the directory of a pack's revisions, that pack's
    modules too. Those of other packs are not: one that cannot be imported must not stop the comparison of another.

    Raises `MigrationError` when one cannot be imported: its tables would look as if nothing declared them.
    """
    names = [_module_name(path, folder) for path in sorted(folder.rglob("*.py"))]
    names += [
        _module_name(path, cogs)
        for path in sorted(cogs.rglob("*.py"))
        if _DECLARES_TABLE.search(path.read_text(encoding="utf-8"))
    ]
    _import(names)
    if (pack := packs.pack_of_scripts(scripts)) is not None:
        _import_models_of(pack)


def _import_models_of(pack: Pack) -> None:
    _import(
        ".".join((pack.package, *path.relative_to(pack.directory).with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted(pack.directory.rglob("*.py"))
        if _DECLARES_TABLE.search(path.read_text(encoding="utf-8"))
    )


def _import(names: Iterable[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as exc:
            raise MigrationError(
                f"{name} declares tables but cannot be imported: {type(exc).__name__}: {exc}; correct it first"
            ) from exc


def _module_name(path: Path, folder: Path) -> str:
    parts = path.relative_to(folder.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def list_partitions(connection: Connection) -> frozenset[tuple[str | None, str]]:
    """Return schema and name of every partition: they come and go with the months and are not in the models."""
    rows = connection.execute(
        text(
            "SELECT CASE WHEN pg_table_is_visible(c.oid) THEN NULL ELSE n.nspname END, c.relname"
            " FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.relispartition"
        )
    )
    return frozenset((row[0], row[1]) for row in rows)


def comparison_options(
    *,
    skip: frozenset[tuple[str | None, str]] = frozenset(),
    metadata: MetaData = Base.metadata,
    scripts: Path = SCRIPTS,
    with_foreign_columns: bool = False,
) -> dict[str, Any]:
    """Return the options that tell Alembic what to compare with the models: what is ours, and nothing else.

    Of Guildbook's revisions that leaves out what packs have, and of a pack's everything but that.

    `skip`: schema and name of tables that are not in the models. `with_foreign_columns`: also compare the columns of
    our tables that no revision made; without it, autogenerate leaves them in place.
    """
    ours = ownership.owned_by(scripts, metadata)
    version_table = ownership.version_table(scripts)
    not_compared = skip | {(None, version_table), (None, ownership.BATCHES_TABLE)}

    def include_name(name: str | None, kind: str, parents: Any) -> bool:
        if kind == "schema":
            return name in SCHEMAS
        if kind == "table":
            table = (parents.get("schema_name"), str(name))
            return table in ours.tables and table not in not_compared
        return True

    def include_object(item: Any, name: str | None, kind: str, is_reflected: bool, counterpart: Any) -> bool:
        if kind == "table" and not is_reflected:
            return (item.schema, item.name) in ours.tables
        if not is_reflected or counterpart is not None or kind == "table":
            return True
        if kind == "column":
            table = (item.table.schema, item.table.name)
            return with_foreign_columns or name in ours.columns.get(table, frozenset())
        return name is None or name in ours.indexes

    return {
        "target_metadata": metadata,
        "include_schemas": True,
        "include_name": include_name,
        "include_object": include_object,
        "version_table": version_table,
        "compare_type": True,
        # Alembic 1.20 evaluates both defaults, and those of a clock never agree: schema_catalog compares them.
        "compare_server_default": False,
    }
