"""The verbs that every repository has, with one meaning each."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import asyncpg
from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    CursorResult,
    Select,
    Table,
    delete,
    exists,
    func,
    inspect,
    literal,
    null,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import joinedload, selectinload
from sqlalchemy.orm.interfaces import ORMOption

import models.relations  # noqa: F401 - adds the relationships of users and members
from models import Base, Part
from utils.exceptions import Conflict, GuildbookError, NotFound, ValidationError, driver_error, translate
from utils.repositories import upsert

ModelT = TypeVar("ModelT", bound=Base)
KeyT = TypeVar("KeyT", int, tuple[int, int])

#: What gives a session: leaving the block commits, an exception rolls back, an open transaction is joined.
Sessions = Callable[[], AbstractAsyncContextManager[AsyncSession]]
#: What to load beside a row: names of relationships, or SQLAlchemy's loader options.
With = str | Sequence[str | ORMOption]

#: Rows that a page may have at most: they are all in memory at once.
MAX_PAGE = 1_000
#: Rows that one statement writes. Building it keeps the event loop for some 10 ms, however many rows follow.
CHUNK = 2_000


@dataclass(frozen=True, slots=True)
class Page(Generic[ModelT, KeyT]):
    """A few rows, in the order of their keys."""

    items: Sequence[ModelT]
    #: What to pass as `after` for the next page; None when this was the last.
    next: KeyT | None


class Repository(Generic[ModelT, KeyT]):
    """The rows of one table, as objects that stay usable after their session.

    Only what is there now counts; `include_gone=True` adds what left or was deleted. Nothing is loaded lazily:
    `with_=("owner",)` loads a relationship, and without it the attribute raises. Mirrored tables may be written, but
    Discord decides: the next event or reconcile puts back what differs, and no row of `changes` tells of the write.

    Raises `NotFound`, `Conflict`, `ValidationError`, and `DatabaseError` or `DatabaseUnavailable` for all the rest.
    """

    model: type[ModelT]

    def __init__(self, sessions: Sessions) -> None:
        """`sessions`: in a cog `bot.get_db_session`."""
        self._sessions: Sessions = sessions
        self._table: Table = cast(Table, self.model.__table__)
        self._keys: tuple[Column[Any], ...] = tuple(self._table.primary_key.columns)
        self._gone: Column[Any] | None = upsert.column_with(self._table, Part.TOMBSTONE)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._table.name}>"

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """Lend a session for a statement of one's own; errors leave it as they leave the verbs."""
        try:
            async with self._sessions() as session:
                yield session
        except Exception as exc:
            error = _own(exc)
            if error is None or error is exc:
                raise
            raise error from exc

    async def get(self, key: KeyT, *, with_: With = (), include_gone: bool = False) -> ModelT:
        """Return a row; raises `NotFound` when there is none."""
        found = await self._look(key, with_)
        if found is None:
            raise self._missing(key)
        went = self._went(found)
        if went is not None and not include_gone:
            raise NotFound(f"{self._table.name} {key} went away at {went:%Y-%m-%d %H:%M}: include_gone=True finds it")
        return found

    async def find(self, key: KeyT, *, with_: With = (), include_gone: bool = False) -> ModelT | None:
        """Return a row, or None when there is none."""
        found = await self._look(key, with_)
        return None if found is None or (self._went(found) is not None and not include_gone) else found

    async def list(
        self,
        *where: ColumnElement[bool],
        after: KeyT | None = None,
        limit: int = 100,
        with_: With = (),
        include_gone: bool = False,
    ) -> Page[ModelT, KeyT]:
        """Return the next rows by key that fulfil all conditions.

        `after`: `Page.next` of the page before, None for the first page. `limit`: 1 to `MAX_PAGE` rows.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise ValidationError(f"a page has 1 to {MAX_PAGE} rows, not {limit}: use stream() for all of them")
        query = self._select(*where, with_=with_, include_gone=include_gone)
        if after is not None:
            query = query.where(self._beyond(after, where))
        async with self.session() as session:
            rows = (await session.scalars(query.order_by(*self._keys).limit(limit + 1))).unique().all()
        more = len(rows) > limit
        return Page(rows[:limit], self._key_of(rows[limit - 1]) if more else None)

    async def pages(
        self,
        *where: ColumnElement[bool],
        after: KeyT | None = None,
        limit: int = 500,
        with_: With = (),
        include_gone: bool = False,
    ) -> AsyncIterator[Page[ModelT, KeyT]]:
        """Go through all pages; each is a transaction of its own, so that nothing is held while one is worked on."""
        while True:
            page = await self.list(*where, after=after, limit=limit, with_=with_, include_gone=include_gone)
            if page.items:
                yield page
            if page.next is None:
                return
            after = page.next

    async def stream(
        self, *where: ColumnElement[bool], with_: With = (), include_gone: bool = False
    ) -> AsyncIterator[ModelT]:
        """Go through all rows by key, a page at a time."""
        async for page in self.pages(*where, with_=with_, include_gone=include_gone):
            for row in page.items:
                yield row

    async def count(self, *where: ColumnElement[bool], include_gone: bool = False) -> int:
        """Return how many rows fulfil all conditions."""
        query = select(func.count()).select_from(self._table).where(*where, *self._there(include_gone))
        async with self.session() as session:
            return (await session.execute(query)).scalar_one()

    async def exists(self, key: KeyT, *, include_gone: bool = False) -> bool:
        """Tell whether there is a row."""
        async with self.session() as session:
            found = await session.scalar(select(exists().where(self._is(key), *self._there(include_gone))))
        return bool(found)

    async def add(self, row: ModelT) -> ModelT:
        """Write a new row and return it with what the database filled in; raises `Conflict` when its key is taken."""
        for name in self._empty_json(vars(row)):
            setattr(row, name, null())
        async with self.session() as session:
            session.add(row)
            await session.flush()
            await session.refresh(row)
        return row

    async def upsert_many(self, rows: Iterable[Mapping[str, Any]], *, chunk: int = CHUNK) -> int:
        """Write rows, new or not, all or none, and return how many were not in the table just so.

        Every row has the same columns, the key among them; columns left out keep what they have. Of two rows with one
        key the later counts. A row that had gone is there again. `chunk`: rows in one statement.
        """
        names, given = await upsert.in_key_order(self._table, rows)
        if not given:
            return 0
        statement = upsert.statement(self._table, names)
        written = 0
        async with self.session() as session:
            for start in range(0, len(given), chunk):
                values = upsert.arrays(self._table, names, given[start : start + chunk])
                result = await session.execute(statement, values, execution_options={"preserve_rowcount": True})
                written += cast("CursorResult[Any]", result).rowcount
        return written

    async def update(self, key: KeyT, /, *, include_gone: bool = False, **values: Any) -> ModelT:
        """Set columns of a row and return it; raises `NotFound` when there is none.

        A value may be an expression: `update(key, xp=MemberStats.xp + 5)` loses no other's points.
        """
        upsert.check_columns(self._table, values)
        if not values or any(column.name in values for column in self._keys):
            raise ValidationError(f"update() of {self._table.name} {key} needs columns beside the key, got {[*values]}")
        touched = upsert.column_with(self._table, Part.TOUCHED)
        if touched is not None:
            values.setdefault(touched.name, func.now())
        values |= dict.fromkeys(self._empty_json(values), null())
        change = update(self.model).where(self._is(key), *self._there(include_gone)).values(**values)
        async with self.session() as session:
            row: ModelT | None = await session.scalar(
                change.returning(self.model),
                execution_options={"populate_existing": True, "synchronize_session": False},
            )
        if row is None:
            raise self._missing(key)
        return row

    async def delete(self, key: KeyT) -> None:
        """Mark a row as gone, or remove it where the table keeps nothing that is gone; raises `NotFound`."""
        if self._gone is not None:
            going: dict[str, Any] = {self._gone.name: func.now()}
            await self.update(key, **going)
            return
        async with self.session() as session:
            row = await session.scalar(
                delete(self.model).where(self._is(key)).returning(self._keys[0]),
                execution_options={"synchronize_session": False},
            )
        if row is None:
            raise self._missing(key)

    async def _look(self, key: KeyT, with_: With) -> ModelT | None:
        options = self._options(with_)
        async with self.session() as session:
            return await session.get(self.model, self._parts(key), options=options, populate_existing=bool(options))

    async def _all(self, query: Select[ModelT]) -> Sequence[ModelT]:
        async with self.session() as session:
            return (await session.scalars(query)).unique().all()

    def _select(self, *where: ColumnElement[bool], with_: With = (), include_gone: bool = False) -> Select[ModelT]:
        return select(self.model).where(*where, *self._there(include_gone)).options(*self._options(with_))

    def _there(self, include_gone: bool) -> tuple[ColumnElement[bool], ...]:
        return () if include_gone or self._gone is None else (self._gone.is_(None),)

    def _went(self, row: ModelT) -> Any:
        return None if self._gone is None else getattr(row, self._gone.name)

    def _missing(self, key: KeyT) -> NotFound:
        return NotFound(f"{self._table.name} has no row {key}")

    def _parts(self, key: KeyT) -> tuple[int, ...]:
        parts = key if isinstance(key, tuple) else (key,)
        if len(parts) != len(self._keys):
            names = ", ".join(column.name for column in self._keys)
            raise ValidationError(f"the key of {self._table.name} is ({names}), not {key!r}")
        return parts

    def _key_of(self, row: ModelT) -> KeyT:
        parts = tuple(getattr(row, column.name) for column in self._keys)
        return cast(KeyT, parts if len(parts) > 1 else parts[0])

    def _is(self, key: KeyT) -> ColumnElement[bool]:
        return tuple_(*self._keys) == tuple_(*self._literals(key))

    def _beyond(self, key: KeyT, where: Sequence[ColumnElement[bool]]) -> ColumnElement[bool]:
        first, *others = self._literals(key)
        # Within one guild, comparing pairs would read it from its first row on: the rest of the key says it all.
        within = getattr(self.model, self._keys[0].name) == first
        if others and any(within.compare(condition) for condition in where):
            return tuple_(*self._keys[1:]) > tuple_(*others)
        return tuple_(*self._keys) > tuple_(*self._literals(key))

    def _literals(self, key: KeyT) -> Iterable[ColumnElement[Any]]:
        return (literal(part, column.type) for part, column in zip(self._parts(key), self._keys, strict=True))

    def _empty_json(self, values: Mapping[str, Any]) -> Sequence[str]:
        """Return the columns whose None SQLAlchemy would write as JSON's null, which is a value."""
        columns = (column.name for column in self._table.columns if isinstance(column.type, JSON))
        return [name for name in columns if name in values and values[name] is None]

    def _options(self, with_: With) -> Sequence[ORMOption]:
        return [self._option(wanted) for wanted in ((with_,) if isinstance(with_, str) else with_)]

    def _option(self, wanted: str | ORMOption) -> ORMOption:
        if not isinstance(wanted, str):
            return wanted
        known = inspect(self.model).relationships
        if wanted not in known:
            raise ValidationError(f"{self._table.name} has no {wanted!r} to load: there are {', '.join(known.keys())}")
        attribute = getattr(self.model, wanted)
        return selectinload(attribute) if known[wanted].uselist else joinedload(attribute)


def _own(exc: Exception) -> GuildbookError | None:
    """Return our error for what a session raised; None when it is none of the database's."""
    cause = driver_error(exc)
    if isinstance(exc, Conflict) or not isinstance(cause, asyncpg.IntegrityConstraintViolationError):
        return translate(exc)
    constraint = getattr(cause, "constraint_name", None)
    told = str(cause).splitlines()[0]
    detail = getattr(cause, "detail", None)
    state = getattr(cause, "sqlstate", None)
    return Conflict(f"{told} [{state}]" + (f": {detail}" if detail else ""), sqlstate=state, constraint=constraint)
