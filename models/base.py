"""Shared by all tables: naming convention, snowflake columns, stamps, and the marks that other code derives from."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any, Protocol, TypeVar, overload

from sqlalchemy import ARRAY, BigInteger, Column, Computed, DateTime, MetaData, Table, func
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedColumn, mapped_column, relationship
from sqlalchemy.schema import SchemaItem

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: First millisecond of 2015 in Unix time, from which snowflakes count (Discord API reference, "Snowflakes").
DISCORD_EPOCH_MS = 1_420_070_400_000


class Erase(enum.Enum):
    """What erasing a person's data does to a column."""

    KEEP = "keep"  #: not about a person
    SUBJECT = "subject"  #: the person's id, by which their rows are found
    CLEAR = "clear"  #: about the person: emptied in every row found


class Part(enum.Enum):
    """How the merge treats a column of a mirrored table."""

    DATA = "data"  #: compared, written, and recorded in `changes`
    QUIET = "quiet"  #: compared and written, not recorded: it changes without anyone acting
    TOMBSTONE = "tombstone"  #: when the object was removed; None while it exists
    STAMP = "stamp"  #: stamp of the observation that last changed the row
    TOUCHED = "touched"  #: database time of the last change


class ColumnType(Protocol[T_co]):
    """A type of SQLAlchemy's whose values are of the type `T_co` in Python: `Text` is a `ColumnType[str]`."""

    @property
    def _sa_typing_python_type(self) -> T_co: ...  # SQLAlchemy has it for type checkers only


class Base(DeclarativeBase):
    """The declarative base; its metadata holds all tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: DateTime(timezone=True)}  # noqa: RUF012 - read by SQLAlchemy only


@overload
def marked(
    type_: ARRAY[T], /, *args: Any, erase: Erase = ..., part: Part = ..., **kwargs: Any
) -> MappedColumn[list[T]]: ...


@overload
def marked(
    type_: ColumnType[T] | type[ColumnType[T]], /, *args: Any, erase: Erase = ..., part: Part = ..., **kwargs: Any
) -> MappedColumn[T]: ...


@overload
def marked(*args: SchemaItem, erase: Erase = ..., part: Part = ..., **kwargs: Any) -> MappedColumn[Any]: ...


def marked(
    *args: Any,
    erase: Erase = Erase.KEEP,
    part: Part = Part.DATA,
    **kwargs: Any,
) -> MappedColumn[Any]:
    """Declare a column with its marks. mypy compares its type with the annotation, as in `Mapped[str] = marked(Text)`.

    Without a type, SQLAlchemy derives it from the annotation.
    """
    return mapped_column(*args, info={"erase": erase, "part": part}, **kwargs)


def snowflake(*args: Any, erase: Erase = Erase.KEEP, **kwargs: Any) -> MappedColumn[int]:
    """Declare a column that holds a Discord id; without autoincrement, because Discord assigns the ids."""
    if kwargs.get("primary_key"):
        kwargs.setdefault("autoincrement", False)
    return marked(BigInteger, *args, erase=erase, **kwargs)


def created_at_of(column: str) -> Computed:
    """Return the generated-column expression for a snowflake's creation time."""
    return Computed(f"to_timestamp((({column} >> 22) + {DISCORD_EPOCH_MS}) / 1000.0)", persisted=True)


def time_id(sequence: str) -> str:
    """Return the default of a time-ordered id: milliseconds as in a snowflake, then the low 22 bits of a sequence."""
    return (
        f"(((extract(epoch FROM clock_timestamp()) * 1000)::bigint - {DISCORD_EPOCH_MS}) << 22)"
        f" | (nextval('{sequence}') & 4194303)"
    )


class Mirrored:
    """Columns of every mirrored table."""

    #: Stamp of the observation that last changed the row: lease epoch in the high bits, receive counter in the low 40.
    stamp: Mapped[int] = mapped_column(
        BigInteger, nullable=False, server_default="0", info={"erase": Erase.KEEP, "part": Part.STAMP}, sort_order=90
    )
    #: Database time of the last change to the row.
    updated_at: Mapped[datetime] = mapped_column(
        nullable=False, server_default=func.now(), info={"erase": Erase.KEEP, "part": Part.TOUCHED}, sort_order=91
    )


def tombstone() -> MappedColumn[datetime | None]:
    """Declare the column that holds the time of an object's removal."""
    return marked(DateTime(timezone=True), part=Part.TOMBSTONE, sort_order=80)


def related(join: str, **kwargs: Any) -> Any:
    """Declare a relationship without a foreign key: read-only, and loaded only on request."""
    return relationship(primaryjoin=join, viewonly=True, lazy="raise", **kwargs)


def part_of(column: Column[Any]) -> Part:
    """Return how the merge treats a column; an unmarked column is data."""
    part: Part = column.info.get("part", Part.DATA)
    return part


def mirrored_tables() -> dict[str, Table]:
    """Return the tables that mirror Discord, by name."""
    return {
        name: table
        for name, table in Base.metadata.tables.items()
        if any(part_of(column) is Part.STAMP for column in table.columns) and table.schema is None
    }
