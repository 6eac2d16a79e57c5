"""The forms of bots that were written for other documentation: docs/reference/documented-forms.md.

tests/docs/test_forms.py runs each in a cog, over the wire, as it stands here.
"""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """One line of a cog. `db` is `self.db`, the same as `bot.db`."""

    code: str
    #: What it returns.
    returns: str
    #: What differs from what the author may expect; empty: nothing.
    differs: str = ""


FORMS: dict[str, list[Form]] = {
    "Sessions": [
        Form(
            "session = await self.session_factory()",
            "an `AsyncSession`; the factory is `bot.get_db_session`, passed without calling it",
            "You commit, and you close it. It joins the open transaction of its context. Its methods raise SQLAlchemy's"
            " errors",
        ),
        Form("await session.execute(select(User))", "SQLAlchemy's result"),
        Form("session.add(MemberStats(guild_id=guild_id, user_id=1, xp=5))", "None"),
        Form("await session.commit()", "None", "Cached results of the tables that were written are dropped"),
        Form("await session.refresh(row)", "None", "Rows stay readable after a commit: nothing expires"),
        Form("async with session.begin():", "the transaction", "After a commit; the first statement begins one, too"),
        Form("await session.close()", "None", "Rolls back what was not committed"),
        Form("async with self.bot.get_db_session() as session:", "the session", "The end of the block commits"),
    ],
    "Statements": [
        Form(
            "await db.execute(sql, *args, invalidate_cache=False)",
            "the command tag, such as `UPDATE 3`",
            "`invalidate_cache=False` keeps cached results, outdated for up to `CACHE_TTL_SECONDS`. Default: True",
        ),
        Form("await db.execute_many(sql, rows, invalidate_cache=False)", "None", "All rows or none"),
        Form("await db.executemany(sql, rows)", "None", "The same as `execute_many`"),
        Form(
            'await db.copy_records_to_table("member_stats", records=rows, columns=columns, invalidate_cache=False)',
            "`COPY n`",
        ),
        Form(
            "await db.fetchval(sql, column=1)",
            "one column of the first row, None without a row",
            'Also by name: `column="xp"`',
        ),
        Form(
            "await db.fetch(sql, as_=Points)", "`list[Points]`", "`Points` is a pydantic model, dataclass or NamedTuple"
        ),
        Form("await db.fetchrow(sql, as_=Points)", "`Points`, or None"),
        Form("await db.fetch(sql, stale_if_error=3600)", "rows", "In an outage, those that were read before"),
        Form("async for row in db.cursor(sql):", "rows, 50 at a time", "Outside a transaction it has one of its own"),
        Form("cursor = await db.cursor(sql)", "a cursor with `fetch`, `fetchrow`, `forward`", "In a transaction only"),
        Form('statement = await db.prepare_statement("points of", sql)', "a statement with the verbs of `bot.db`"),
    ],
    "Connections": [
        Form("async with db.acquire() as connection:", "an asyncpg connection", "It is reset after the block"),
        Form(
            "connection = await db.acquire()",
            "the same, held by hand",
            "Outside the open transaction. Its methods raise asyncpg's errors",
        ),
        Form("await db.release(connection)", "None", "Rolls back an open transaction of the connection"),
        Form("if await db.check_connection_health():", "a mapping that is false while the database does not answer"),
        Form("await db.validate_connections()", "`checked` and `replaced`"),
    ],
    "Transactions": [
        Form("async with db.transaction() as transaction:", "the transaction, with the verbs of `bot.db`"),
        Form("async with await db.transaction():", "the same"),
        Form(
            "result = await db.transaction(callback)",
            "what the callback returns",
            "The callback gets the transaction if it takes an argument",
        ),
        Form(
            "result = await db.run(callback)",
            "what the callback returns",
            "Runs again after a deadlock or serialization failure",
        ),
        Form(
            'await db.begin_transaction("transfer")',
            "the name",
            "It is rolled back after 60 s (`limit=`), and belongs to no task",
        ),
        Form('await db.execute_in_transaction("transfer", sql, *args)', "the command tag"),
        Form('async with db.in_transaction("transfer"):', "None", "For the other verbs, sessions and repositories"),
        Form('await db.commit_transaction("transfer")', "`{operations, duration}`", "Statements, and seconds"),
        Form('await db.rollback_transaction("transfer")', "`{operations, duration}`"),
        Form(
            "await db.execute_in_transaction([(sql, args), (sql, args)])", "the command tags", "All statements or none"
        ),
    ],
    "Retries": [
        Form(
            'await manager.execute_with_retry(operation, context="load the shop")',
            "what the operation returns",
            "`manager` is `bot.db`. Only transient errors, and those in `errors=`, are retried; the last is raised, and"
            ' "load the shop failed after 5 attempts" logged',
        ),
        Form(
            '@retrying(attempts=3, first_seconds=0.01, max_seconds=1, factor=3, errors=(LookupError,), context="load")',
            "the decorated function",
            "Once inside a transaction, which can only be repeated as a whole",
        ),
    ],
    "Caches and statistics": [
        Form(
            "stats = await db.get_cache_stats()",
            "counters by name",
            "With and without `await`. `hit_rate` is in percent: `print(f\"{stats['hit_rate']}%\")`",
        ),
        Form(
            "self.cache.set(key, value, ttl=3600)",
            "None",
            "The cache keeps at most 1,000 values, whatever their times; without `ttl`, 5 minutes",
        ),
        Form("self.cache.get(key)", "the value, or None"),
        Form("stats = self.bot.stats()", "figures by name, `guilds` and `users` among them"),
    ],
    "Rows": [
        Form("cases = self.repository(Case)", "a `Repository[Case, …]` for a model of your own"),
        Form("case = await cases.get_or_none((guild_id, 1))", "`Case`, or None", "`get` raises `NotFound`"),
        Form('case = await cases.upsert(guild_id=guild_id, number=1, state="open")', "the row"),
        Form("case = await cases.update((guild_id, 1), close)", "the row", "`close(case)` changes the locked row"),
        Form('await cases.delete_where(Case.state == "closed")', "the number of rows"),
        Form('await self.users.by_name("ada", "0042")', "users", "Discriminators are `0`, and four digits of bots"),
        Form(
            "await self.users.statistics()",
            "`total`, `bots`, `verified`, `average_age_days`",
            "Discord shows `verified` of the bot's own account only",
        ),
        Form("await self.guilds.statistics()", "totals", "Without guilds in an outage"),
        Form(
            'guild = await self.guilds.get(guild_id, load="members")', "the guild with `guild.members`", "All at once"
        ),
        Form(
            "await self.guilds.create_with_owner(guild_row, owner_row)",
            "the guild with `owner`",
            "The owner becomes a member",
        ),
    ],
    "Documents": [
        Form(
            'settings = self.documents("shop", Shop, stale_if_error=3600)',
            "the documents of a namespace",
            "Every call must say whose: naming no guild raises `DocumentError`",
        ),
        Form('await settings.guild(guild_id).set("settings", Shop(title="Pies"))', "the version"),
        Form('await settings.user(user_id).get("settings")', "`Shop`", "The same in every guild"),
        Form('await settings.member(guild_id, user_id).get("settings")', "`Shop`"),
        Form('await settings.everywhere().get("settings")', "`Shop`"),
    ],
    "Batches": [
        Form('xp = self.batch("member_stats", size=100, seconds=5, increments=("xp",))', "a write-behind batch"),
        Form('xp.add({"guild_id": guild_id, "user_id": user_id, "xp": 5})', "None", "Written later, exactly once"),
        Form("xp.queue_size", "rows that wait"),
        Form("await xp.flush()", "rows that waited, now written"),
        Form("await xp.force_flush()", "the same", "During an outage, tries at once"),
    ],
}
