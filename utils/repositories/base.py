"""The base class of all repositories: get, find, list, count, add, upsert, update and delete rows of one table."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import asyncpg
from sqlalchemy import (
    ARRAY,
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
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.orm.interfaces import ORMOption

from models import Base, Part
from utils.exceptions import Conflict, NotFound, ValidationError, driver_error, translate_errors
from utils.repositories import upsert

ModelT = TypeVar("ModelT", bound=Base)
#: An id, or the columns of the primary key in their order.
KeyT = TypeVar("KeyT")

#: Opens a session: leaving the block commits, an exception rolls back. In an open transaction it joins that one.
SessionFactory = Callable[[], AbstractAsyncContextManager[AsyncSession]]
#: Relationships to load with a row: names, or SQLAlchemy's loader options.
Load = str | Sequence[str | ORMOption]

#: Maximum number of rows in a page, which is held in memory as a whole.
MAX_PAGE = 1_000
#: Rows per upsert statement. Building one takes about 10 ms of the event loop.
CHUNK = 2_000


@dataclass(frozen=True, slots=True)
class Page(Generic[ModelT, KeyT]):
    """One page of rows, ordered by key."""

    items: Sequence[ModelT]
    #: Pass this as `after` to get the next page; None on the last page.
    next: KeyT | None


class Repository(Generic[ModelT, KeyT]):
    """Reads and writes the rows of one table as ORM objects, which remain usable after their session is closed.

    `self.repository(Case)` of a cog returns one for a model of your own. Its key is the value of the primary key, or a
    tuple of the values. To have keys checked too, declare `class Cases(Repository[Case, tuple[int, int]])` with
    `model = Case`.

    Rows with a tombstone (`left_at`, `deleted_at`) are hidden unless `include_deleted=True`. Relationships are not
    loaded lazily: name them in `load`, for example `load=("owner",)`; reading one that was not loaded raises.
    Mirrored tables can be written, but Discord is authoritative: the next event or reconcile overwrites the row, and
    such a write leaves no row in `changes`.

    Example::

        members = MemberRepository(bot.get_db_session)
        member = await members.get((guild_id, user_id), load="user")
        async for row in members.stream(Member.guild_id == guild_id):
            print(row.nick)

    Raises `NotFound`, `Conflict` and `ValidationError` as documented, and `DatabaseUnavailable` or another
    `DatabaseError` for every other failure.
    """

    model: type[ModelT]

    def __init__(self, get_session: SessionFactory, model: type[ModelT] | None = None) -> None:
        """
        get_session: opens a session; in a cog, pass `bot.get_db_session`.
        model: whose rows; None: those of the class attribute `model`.
        """
        if model is not None:
            self.model = model
        self._get_session: SessionFactory = get_session
        self._table: Table = cast(Table, self.model.__table__)
        self._keys: tuple[Column[Any], ...] = tuple(self._table.primary_key.columns)
        self._tombstone: Column[Any] | None = upsert.find_column(self._table, Part.TOMBSTONE)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._table.name}>"

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """Open a session for your own statements; errors are translated as in the other methods."""
        with translate_errors():
            try:
                async with self._get_session() as session:
                    yield session
            except Exception as exc:
                conflict = _conflict(exc)
                if conflict is None:
                    raise
                raise conflict from exc

    async def get(self, key: KeyT, *, load: Load = (), include_deleted: bool = False) -> ModelT:
        """Return the row with this key. Raises `NotFound` if there is none."""
        row = await self._get(key, load)
        if row is None:
            raise self._not_found(key)
        deleted_at = self._deleted_at(row)
        if deleted_at is not None and not include_deleted:
            raise NotFound(
                f"{self._table.name} {key} has had a tombstone since {deleted_at:%Y-%m-%d %H:%M}:"
                " pass include_deleted=True to get it"
            )
        return row

    async def find(self, key: KeyT, *, load: Load = (), include_deleted: bool = False) -> ModelT | None:
        """Return the row with this key, or None if there is none."""
        row = await self._get(key, load)
        return None if row is None or (self._deleted_at(row) is not None and not include_deleted) else row

    async def get_or_none(self, key: KeyT, *, load: Load = (), include_deleted: bool = False) -> ModelT | None:
        """Do what `find` does."""
        return await self.find(key, load=load, include_deleted=include_deleted)

    async def list(
        self,
        *where: ColumnElement[bool],
        after: KeyT | None = None,
        limit: int = 100,
        load: Load = (),
        include_deleted: bool = False,
    ) -> Page[ModelT, KeyT]:
        """Return a page of the rows that satisfy all conditions, ordered by key.

        `after` is `Page.next` of the previous page, None for the first page. `limit` is 1 to `MAX_PAGE` rows; raises
        `ValidationError` otherwise.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise ValidationError(f"limit must be between 1 and {MAX_PAGE}, not {limit}: use stream() for more rows")
        query = self._select(*where, load=load, include_deleted=include_deleted)
        if after is not None:
            query = query.where(self._after(after, where))
        async with self.session() as session:
            rows = (await session.scalars(query.order_by(*self._keys).limit(limit + 1))).unique().all()
        has_more = len(rows) > limit
        return Page(rows[:limit], self._key_of(rows[limit - 1]) if has_more else None)

    async def pages(
        self,
        *where: ColumnElement[bool],
        after: KeyT | None = None,
        limit: int = 500,
        load: Load = (),
        include_deleted: bool = False,
    ) -> AsyncIterator[Page[ModelT, KeyT]]:
        """Iterate over all pages, each read in its own transaction, so no transaction is open while you process one."""
        while True:
            page = await self.list(*where, after=after, limit=limit, load=load, include_deleted=include_deleted)
            if page.items:
                yield page
            if page.next is None:
                return
            after = page.next

    async def stream(
        self, *where: ColumnElement[bool], load: Load = (), include_deleted: bool = False
    ) -> AsyncIterator[ModelT]:
        """Iterate over all rows that satisfy all conditions, ordered by key, reading a page at a time."""
        async for page in self.pages(*where, load=load, include_deleted=include_deleted):
            for row in page.items:
                yield row

    async def count(self, *where: ColumnElement[bool], include_deleted: bool = False) -> int:
        """Return the number of rows that satisfy all conditions."""
        query = select(func.count()).select_from(self._table).where(*where, *self._not_deleted(include_deleted))
        async with self.session() as session:
            return (await session.execute(query)).scalar_one()

    async def exists(self, key: KeyT, *, include_deleted: bool = False) -> bool:
        """Return whether there is a row with this key."""
        query = select(exists().where(self._has_key(key), *self._not_deleted(include_deleted)))
        async with self.session() as session:
            return bool(await session.scalar(query))

    async def add(self, row: ModelT) -> ModelT:
        """Insert a row and return it with the database's defaults. Raises `Conflict` if its key is taken."""
        for name in self._null_json_columns(vars(row)):
            setattr(row, name, null())
        async with self.session() as session:
            session.add(row)
            await session.flush()
            await session.refresh(row)
        return row

    async def upsert(self, row: Mapping[str, Any] | None = None, /, **values: Any) -> ModelT:
        """Insert or update one row and return it: `upsert(guild_id=1, number=7, state="open")`, or a mapping.

        Columns that are not given keep their values, or get their defaults in a new row. A tombstone is cleared. Raises
        `ValidationError` for values that do not fit the table.
        """
        given = {**(row or {}), **values}
        names, rows = await upsert.sort_by_key(self._table, [given])
        statement, parameters = upsert.upsert_statement(self._table, names), upsert.array_parameters
        async with self.session() as session:
            await session.execute(statement, parameters(self._table, names, rows))
            key = tuple(given[column.name] for column in self._keys)
            written = await session.get(self.model, key, populate_existing=True)
        if written is None:
            raise self._not_found(cast(KeyT, key))  # deleted by somebody else between the two statements
        return written

    async def upsert_many(self, rows: Iterable[Mapping[str, Any]], *, chunk: int = CHUNK) -> int:
        """Insert or update rows in one transaction and return how many were inserted or changed.

        All rows must have the same columns, including the key; other columns keep their values. If two rows have the
        same key, the last one is used. An existing tombstone is cleared. `chunk` is the number of rows per statement.
        Raises `ValidationError` for rows that do not fit the table.
        """
        names, sorted_rows = await upsert.sort_by_key(self._table, rows)
        if not sorted_rows:
            return 0
        statement = upsert.upsert_statement(self._table, names)
        written = 0
        async with self.session() as session:
            for start in range(0, len(sorted_rows), chunk):
                values = upsert.array_parameters(self._table, names, sorted_rows[start : start + chunk])
                result = await session.execute(statement, values, execution_options={"preserve_rowcount": True})
                written += cast("CursorResult[Any]", result).rowcount
        return written

    async def update(
        self,
        key: KeyT,
        change: Callable[[ModelT], None] | None = None,
        /,
        *,
        include_deleted: bool = False,
        **values: Any,
    ) -> ModelT:
        """Change a row and return it. Raises `NotFound` if there is none.

        values: columns and their values. A value may be an SQL expression, so concurrent updates are not lost:
            `update(key, xp=MemberStats.xp + 5)`.
        change: is called with the row, which is locked meanwhile, and sets its attributes, which mypy checks. It may
            raise, and then nothing is changed.

        Raises `ValidationError` for unknown or key columns.

        Example::

            def close(case: Case) -> None:
                if case.state == "closed":
                    raise Declined("This case is closed already.")
                case.state = "closed"

            case = await self.repository(Case).update((guild_id, number), close)
        """
        if change is not None:
            return await self._change(key, change, values, include_deleted)
        upsert.check_columns(self._table, values)
        if not values or any(column.name in values for column in self._keys):
            raise ValidationError(
                f"update() of {self._table.name} {key} needs columns other than the key, got {[*values]}"
            )
        touched = upsert.find_column(self._table, Part.TOUCHED)
        if touched is not None:
            values.setdefault(touched.name, func.now())
        values |= dict.fromkeys(self._null_json_columns(values), null())
        statement = update(self.model).where(self._has_key(key), *self._not_deleted(include_deleted)).values(**values)
        async with self.session() as session:
            row: ModelT | None = await session.scalar(
                statement.returning(self.model),
                execution_options={"populate_existing": True, "synchronize_session": False},
            )
        if row is None:
            raise self._not_found(key)
        return row

    async def delete(self, key: KeyT) -> None:
        """Set the row's tombstone, or delete the row if its table has none. Raises `NotFound` if there is no row."""
        if self._tombstone is not None:
            tombstone: dict[str, Any] = {self._tombstone.name: func.now()}
            await self.update(key, **tombstone)
            return
        async with self.session() as session:
            row = await session.scalar(
                delete(self.model).where(self._has_key(key)).returning(self._keys[0]),
                execution_options={"synchronize_session": False},
            )
        if row is None:
            raise self._not_found(key)

    async def delete_where(self, *where: ColumnElement[bool]) -> int:
        """Delete the rows that satisfy all conditions, or set their tombstones if the table has them; return how many.

        Raises `ValidationError` without a condition; `sqlalchemy.true()` is one for all rows.
        """
        if not where:
            raise ValidationError(f"delete_where() of {self._table.name} needs a condition; true() deletes every row")
        conditions = (*where, *self._not_deleted(include_deleted=False))
        statement: Any = delete(self.model).where(*conditions)
        if self._tombstone is not None:
            changes: dict[str, Any] = {self._tombstone.name: func.now()}
            if (touched := upsert.find_column(self._table, Part.TOUCHED)) is not None:
                changes[touched.name] = func.now()
            statement = update(self.model).where(*conditions).values(**changes)
        async with self.session() as session:
            result = await session.execute(statement, execution_options={"synchronize_session": False})
        return cast("CursorResult[Any]", result).rowcount

    async def _change(
        self, key: KeyT, change: Callable[[ModelT], None], values: Mapping[str, Any], include_deleted: bool
    ) -> ModelT:
        upsert.check_columns(self._table, values)
        nested = [column.name for column in self._table.columns if isinstance(column.type, JSON | ARRAY)]
        async with self.session() as session:
            row = await session.get(self.model, self._key_values(key), with_for_update=True, populate_existing=True)
            if row is None or (self._deleted_at(row) is not None and not include_deleted):
                raise self._not_found(key)
            # SQLAlchemy does not see that a list or dict in a row was changed.
            before = copy.deepcopy({name: getattr(row, name) for name in nested})
            change(row)
            for name, value in values.items():
                setattr(row, name, value)
            for name in nested:
                if getattr(row, name) is not None and getattr(row, name) != before[name]:
                    flag_modified(row, name)
            changed = {name: getattr(row, name) for name in written_names(row)}
            if any(column.name in changed for column in self._keys):
                raise ValidationError(f"update() of {self._table.name} {key} must not change the key")
            for name in self._null_json_columns(changed):
                setattr(row, name, null())
            touched = upsert.find_column(self._table, Part.TOUCHED)
            if touched is not None and changed and touched.name not in changed:
                setattr(row, touched.name, func.now())
            await session.flush()
            await session.refresh(row)
        return row

    async def _get(self, key: KeyT, load: Load) -> ModelT | None:
        options = self._options(load)
        async with self.session() as session:
            return await session.get(
                self.model, self._key_values(key), options=options, populate_existing=bool(options)
            )

    async def _fetch(self, query: Select[ModelT]) -> Sequence[ModelT]:
        async with self.session() as session:
            return (await session.scalars(query)).unique().all()

    def _select(self, *where: ColumnElement[bool], load: Load = (), include_deleted: bool = False) -> Select[ModelT]:
        conditions = (*where, *self._not_deleted(include_deleted))
        return select(self.model).where(*conditions).options(*self._options(load))

    def _not_deleted(self, include_deleted: bool) -> tuple[ColumnElement[bool], ...]:
        return () if include_deleted or self._tombstone is None else (self._tombstone.is_(None),)

    def _deleted_at(self, row: ModelT) -> Any:
        return None if self._tombstone is None else getattr(row, self._tombstone.name)

    def _not_found(self, key: KeyT) -> NotFound:
        return NotFound(f"{self._table.name} has no row {key}")

    def _key_values(self, key: KeyT) -> tuple[Any, ...]:
        values = key if isinstance(key, tuple) else (key,)
        if len(values) != len(self._keys):
            names = ", ".join(column.name for column in self._keys)
            raise ValidationError(f"the key of {self._table.name} is ({names}), not {key!r}")
        return values

    def _key_of(self, row: ModelT) -> KeyT:
        values = tuple(getattr(row, column.name) for column in self._keys)
        return cast(KeyT, values if len(values) > 1 else values[0])

    def _has_key(self, key: KeyT) -> ColumnElement[bool]:
        return tuple_(*self._keys) == tuple_(*self._key_literals(key))

    def _after(self, key: KeyT, where: Sequence[ColumnElement[bool]]) -> ColumnElement[bool]:
        first, *others = self._key_literals(key)
        # If `where` already fixes the guild, compare only the rest of the key: for a comparison of pairs, PostgreSQL
        # would scan the guild from its first row.
        same_guild = getattr(self.model, self._keys[0].name) == first
        if others and any(same_guild.compare(condition) for condition in where):
            return tuple_(*self._keys[1:]) > tuple_(*others)
        return tuple_(*self._keys) > tuple_(*self._key_literals(key))

    def _key_literals(self, key: KeyT) -> Iterable[ColumnElement[Any]]:
        return (literal(value, column.type) for value, column in zip(self._key_values(key), self._keys, strict=True))

    def _null_json_columns(self, values: Mapping[str, Any]) -> Sequence[str]:
        """Return the JSON columns set to None: SQLAlchemy would write JSON's null instead of SQL's NULL."""
        columns = (column.name for column in self._table.columns if isinstance(column.type, JSON))
        return [name for name in columns if name in values and values[name] is None]

    def _options(self, load: Load) -> Sequence[ORMOption]:
        return [self._option(item) for item in ((load,) if isinstance(load, str) else load)]

    def _option(self, item: str | ORMOption) -> ORMOption:
        if not isinstance(item, str):
            return item
        relationships = inspect(self.model).relationships
        if item not in relationships:
            raise ValidationError(
                f"{self._table.name} has no relationship {item!r}: choose from {', '.join(relationships.keys())}"
            )
        attribute = getattr(self.model, item)
        return selectinload(attribute) if relationships[item].uselist else joinedload(attribute)


def written_names(row: Base) -> set[str]:
    """Return the columns of a row that were set to other values since it was loaded."""
    state = inspect(row)
    return {column.key for column in state.mapper.column_attrs if state.attrs[column.key].history.has_changes()}


def _conflict(exc: Exception) -> Conflict | None:
    """Return a `Conflict` for a constraint violation that is not one yet, None for any other error."""
    cause = driver_error(exc)
    if isinstance(exc, Conflict) or not isinstance(cause, asyncpg.IntegrityConstraintViolationError):
        return None
    constraint = getattr(cause, "constraint_name", None)
    message = str(cause).splitlines()[0]
    detail = getattr(cause, "detail", None)
    state = getattr(cause, "sqlstate", None)
    return Conflict(f"{message} [{state}]" + (f": {detail}" if detail else ""), sqlstate=state, constraint=constraint)
