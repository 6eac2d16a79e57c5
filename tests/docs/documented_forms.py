"""A cog that uses every form of docs/forms.py as it is written there. `/forms` runs one section and answers `ok`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import discord
from discord import app_commands
from pydantic import BaseModel
from sqlalchemy import Integer, Text, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped

from models import MemberStats, User
from models.base import Base, marked, snowflake
from utils.base_cog import BaseCog, Guildbook
from utils.db import Transaction, retrying

PUT = """INSERT INTO member_stats (guild_id, user_id, xp) VALUES ($1, $2, $3)
ON CONFLICT (guild_id, user_id) DO UPDATE SET xp = excluded.xp"""
POINTS = "SELECT user_id, xp FROM member_stats ORDER BY user_id"
COUNT = "SELECT count(*) FROM member_stats"


class Case(Base):
    """A table of the author's own."""

    __tablename__ = "documented_cases"
    guild_id: Mapped[int] = snowflake(primary_key=True)
    number: Mapped[int] = marked(Integer, primary_key=True, autoincrement=False)
    state: Mapped[str] = marked(Text)


@dataclass
class Points:
    """A typed row."""

    user_id: int
    xp: int


class Shop(BaseModel):
    """A document."""

    title: str = "Shop"


def close(case: Case) -> None:
    """Close a case."""
    case.state = "closed"


class DocumentedForms(BaseCog):
    """Runs them."""

    def __init__(self, bot: Guildbook, session_factory: Callable[[], Awaitable[AsyncSession]]) -> None:
        super().__init__(bot)
        self.session_factory = session_factory
        self.attempts = 0

    @app_commands.command(description="Run the forms of one section")
    async def forms(self, interaction: discord.Interaction[Guildbook], section: str) -> None:
        """Run them."""
        assert interaction.guild_id is not None
        await interaction.response.defer()
        run = getattr(self, section.lower().replace(" ", "_"))
        await self.db.execute("DELETE FROM member_stats")
        await run(interaction.guild_id, interaction.user.id)
        await interaction.followup.send("ok")

    async def sessions(self, guild_id: int, user_id: int) -> None:
        """Use sessions by hand and in blocks."""
        db = self.db
        assert await db.fetchval(COUNT) == 0
        session = await self.session_factory()
        try:
            users = await session.execute(select(User))
            assert user_id in {user.id for user in users.scalars()}
            session.add(MemberStats(guild_id=guild_id, user_id=1, xp=5))
            await session.commit()
            assert await db.fetchval(COUNT) == 1
            row = await session.get_one(MemberStats, (guild_id, 1))
            await session.refresh(row)
            await session.commit()
            async with session.begin():
                row.xp += 1
            assert await db.fetchval("SELECT xp FROM member_stats") == 6
            row.xp = 0
        finally:
            await session.close()
        async with self.bot.get_db_session() as session:
            assert (await session.get_one(MemberStats, (guild_id, 1))).xp == 6

    async def statements(self, guild_id: int, user_id: int) -> None:
        """Run statements."""
        db, sql, args = self.db, PUT, (guild_id, 1, 10)
        assert await db.fetchval(COUNT) == 0
        rows, columns = [(guild_id, 2, 20)], ("guild_id", "user_id", "xp")
        assert await db.execute(sql, *args, invalidate_cache=False) == "INSERT 0 1"
        await db.execute_many(sql, rows, invalidate_cache=False)
        rows = [(guild_id, 3, 30)]
        await db.copy_records_to_table("member_stats", records=rows, columns=columns, invalidate_cache=False)
        assert await db.fetchval(COUNT) == 0, "still the cached result"
        rows = [(guild_id, 4, 40)]
        await db.executemany(sql, rows)
        assert await db.fetchval(COUNT) == 4
        sql = POINTS
        assert await db.fetchval(sql, column=1) == 10
        expected = [Points(number, number * 10) for number in range(1, 5)]
        assert await db.fetch(sql, as_=Points) == expected
        assert await db.fetchrow(sql, as_=Points) == expected[0]
        assert len(await db.fetch(sql, stale_if_error=3600)) == 4
        found = []
        async for row in db.cursor(sql):
            found.append(Points(**row))  # noqa: PERF401 - the form as authors write it
        assert found == expected
        async with db.transaction():
            cursor = await db.cursor(sql)
            assert await cursor.forward(1) == 1
            assert [row["xp"] for row in await cursor.fetch(2)] == [20, 30]
            assert await cursor.fetchrow() is not None
        statement = await db.prepare_statement("points of", sql)
        assert len(await statement.fetch()) == 4

    async def connections(self, guild_id: int, user_id: int) -> None:
        """Hold connections."""
        db = self.db
        async with db.acquire() as connection:
            await connection.execute(PUT, guild_id, 1, 10)
        connection = await db.acquire()
        try:
            async with connection.transaction():
                await connection.execute(PUT, guild_id, 2, 20)
        finally:
            await db.release(connection)
        assert await db.fetchval(COUNT) == 2
        is_healthy = False
        if await db.check_connection_health():
            is_healthy = True
        assert is_healthy
        assert (await db.validate_connections())["replaced"] == 0

    async def transactions(self, guild_id: int, user_id: int) -> None:
        """Use transactions in every way."""
        db, sql, args = self.db, PUT, (guild_id, 1, 10)
        async with db.transaction() as transaction:
            await transaction.execute(sql, *args)
        async with await db.transaction():
            await db.execute(sql, guild_id, 2, 20)

        async def callback(transaction: Transaction) -> int:
            return int(await transaction.fetchval("SELECT sum(xp)::int FROM member_stats"))

        result = await db.transaction(callback)
        assert result == 30
        result = await db.run(callback)
        assert result == 30
        await db.begin_transaction("transfer")
        assert await db.execute_in_transaction("transfer", sql, *args) == "INSERT 0 1"
        async with db.in_transaction("transfer"):
            await db.execute(sql, guild_id, 3, 30)
        assert await db.fetchval(COUNT) == 2
        summary = await db.commit_transaction("transfer")
        assert summary["operations"] == 2
        assert summary["duration"] > 0
        assert await db.fetchval(COUNT) == 3
        await db.begin_transaction("transfer")
        await db.execute_in_transaction("transfer", "DELETE FROM member_stats")
        await db.rollback_transaction("transfer")
        assert await db.execute_in_transaction([(sql, args), (sql, args)]) == ["INSERT 0 1", "INSERT 0 1"]
        assert await db.fetchval(COUNT) == 3

    async def retries(self, guild_id: int, user_id: int) -> None:
        """Retry."""
        manager = self.db

        async def operation() -> int:
            return int(await manager.fetchval("SELECT 7"))

        assert await manager.execute_with_retry(operation, context="load the shop") == 7

        @retrying(attempts=3, first_seconds=0.01, max_seconds=1, factor=3, errors=(LookupError,), context="load")
        async def load() -> int:
            self.attempts += 1
            if self.attempts < 3:
                raise LookupError
            return self.attempts

        assert await load() == 3

    async def caches_and_statistics(self, guild_id: int, user_id: int) -> None:
        """Read statistics."""
        db, key, value = self.db, "a", 1
        stats = await db.get_cache_stats()
        assert stats == db.get_cache_stats()
        assert 0 <= float(f"{stats['hit_rate']}%".removesuffix("%")) <= 100
        self.cache.set(key, value, ttl=3600)
        assert self.cache.get(key) == 1
        assert self.totals() == {"total": 1, "unavailable": 0}

    def totals(self) -> Any:
        """Return the number of guilds."""
        stats = self.bot.stats()
        assert "users" in stats
        return stats["guilds"]

    async def rows(self, guild_id: int, user_id: int) -> None:
        """Use repositories."""
        cases = self.repository(Case)
        case = await cases.get_or_none((guild_id, 1))
        assert case is None
        case = await cases.upsert(guild_id=guild_id, number=1, state="open")
        assert case.state == "open"
        case = await cases.update((guild_id, 1), close)
        assert case.state == "closed"
        assert await cases.delete_where(Case.state == "closed") == 1
        assert await self.users.by_name("ada", "0042") == []
        assert (await self.users.statistics()).total > 0
        assert (await self.guilds.statistics()).guilds == 1
        guild = await self.guilds.get(guild_id, load="members")
        assert user_id in {member.user_id for member in guild.members}
        guild_row, owner_row = {"id": 1, "name": "New"}, {"id": user_id}
        await self.guilds.create_with_owner(guild_row, owner_row)
        assert await self.members.get_or_none((1, user_id)) is not None

    async def documents_(self, guild_id: int, user_id: int) -> None:
        """Use documents."""
        settings = self.documents("shop", Shop, stale_if_error=3600)
        await settings.guild(guild_id).set("settings", Shop(title="Pies"))
        assert await settings.user(user_id).get("settings") == Shop()
        assert await settings.member(guild_id, user_id).get("settings") == Shop()
        assert await settings.everywhere().get("settings") == Shop()
        assert (await settings.guild(guild_id).get("settings")).title == "Pies"

    async def batches(self, guild_id: int, user_id: int) -> None:
        """Write behind."""
        xp = self.batch("member_stats", size=100, seconds=5, increments=("xp",))
        xp.add({"guild_id": guild_id, "user_id": user_id, "xp": 5})
        xp.add({"guild_id": guild_id, "user_id": user_id, "xp": 5})
        assert xp.queue_size == 2
        await xp.flush()
        await xp.force_flush()
        assert await self.db.fetchval("SELECT xp FROM member_stats") == 10


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog(DocumentedForms(bot, bot.get_db_session))
