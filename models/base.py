"""What every table shares: naming, snowflake keys, ordering stamps, and the marks that other code derives from."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Column, Computed, DateTime, MetaData, Table, func
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedColumn, mapped_column

#: First millisecond of 2015 in Unix time: the zero of every snowflake (Discord API reference, "Snowflakes").
DISCORD_EPOCH_MS = 1_420_070_400_000


class Erase(enum.Enum):
    """What erasing one person must do to a column."""

    KEEP = "keep"  #: says nothing about a person
    SUBJECT = "subject"  #: names the person: rows are found by it
    CLEAR = "clear"  #: is about the person: emptied in every row found


class Part(enum.Enum):
    """What a column is to the merge that keeps a mirrored table equal to Discord."""

    DATA = "data"  #: compared, written, and kept in `changes`
    QUIET = "quiet"  #: compared and written, but no history: it moves without anyone acting
    TOMBSTONE = "tombstone"  #: when the thing went away; None while it is there
    STAMP = "stamp"  #: order of the observation that last changed the row
    TOUCHED = "touched"  #: database time of the last change


class Base(DeclarativeBase):
    """The declarative base: one metadata for every table."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: DateTime(timezone=True)}  # noqa: RUF012 - read by SQLAlchemy, never changed


def marked(
    *args: Any,
    erase: Erase = Erase.KEEP,
    part: Part = Part.DATA,
    **kwargs: Any,
) -> MappedColumn[Any]:
    """Declare a column together with its marks."""
    return mapped_column(*args, info={"erase": erase, "part": part}, **kwargs)


def snowflake(*args: Any, erase: Erase = Erase.KEEP, **kwargs: Any) -> MappedColumn[Any]:
    """Declare a column that holds a Discord id (without autoincrement: Discord hands the ids out)."""
    if kwargs.get("primary_key"):
        kwargs.setdefault("autoincrement", False)
    return marked(BigInteger, *args, erase=erase, **kwargs)


def created_at_of(column: str) -> Computed:
    """Return the generated-column expression for the moment in which a snowflake was made."""
    return Computed(f"to_timestamp((({column} >> 22) + {DISCORD_EPOCH_MS}) / 1000.0)", persisted=True)


def time_id(sequence: str) -> str:
    """Return the default of a time-ordered id: milliseconds like a snowflake's, then a sequence's low 22 bits."""
    return (
        f"(((extract(epoch FROM clock_timestamp()) * 1000)::bigint - {DISCORD_EPOCH_MS}) << 22)"
        f" | (nextval('{sequence}') & 4194303)"
    )


class Mirrored:
    """Columns of every table that the merge keeps equal to Discord."""

    #: Order of the observation that last changed the row: lease epoch in the high bits, receive counter in the low 40.
    stamp: Mapped[int] = mapped_column(
        BigInteger, nullable=False, server_default="0", info={"erase": Erase.KEEP, "part": Part.STAMP}, sort_order=90
    )
    #: Pool time of the last change to the row.
    updated_at: Mapped[datetime] = mapped_column(
        nullable=False, server_default=func.now(), info={"erase": Erase.KEEP, "part": Part.TOUCHED}, sort_order=91
    )


def tombstone() -> MappedColumn[Any]:
    """Declare the column that says when the thing went away."""
    return marked(DateTime(timezone=True), part=Part.TOMBSTONE, sort_order=80)


def part_of(column: Column[Any]) -> Part:
    """Return what a column is to the merge (unmarked columns are data)."""
    part: Part = column.info.get("part", Part.DATA)
    return part


def mirrored_tables() -> dict[str, Table]:
    """Return the tables that the merge keeps equal to Discord, by name."""
    return {
        name: table
        for name, table in Base.metadata.tables.items()
        if any(part_of(column) is Part.STAMP for column in table.columns) and table.schema is None
    }
