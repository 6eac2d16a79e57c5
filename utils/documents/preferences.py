"""What members chose in a guild: read and written in one place, for /preferences and for cogs alike."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

import asyncpg

from utils.exceptions import ValidationError
from utils.text import scrub_payload

#: Language, script and region of BCP 47 (RFC 5646, 2.1), which covers Discord's locales: `de`, `pt-BR`, `zh-Hans`.
_LANGUAGE = re.compile(r"([a-z]{2,3})(?:-([a-z]{4}))?(?:-([a-z]{2}|[0-9]{3}))?", re.IGNORECASE | re.ASCII)

_GET = "SELECT notifications, language, extra FROM member_preferences WHERE guild_id = $1 AND user_id = $2"
_SET = """
INSERT INTO member_preferences AS p (guild_id, user_id, notifications, language) VALUES ($1, $2, $3, $4)
ON CONFLICT (guild_id, user_id) DO UPDATE SET
    notifications = CASE WHEN $5 THEN excluded.notifications ELSE p.notifications END,
    language = CASE WHEN $6 THEN excluded.language ELSE p.language END
RETURNING notifications, language, extra
"""
_SET_EXTRA = """
INSERT INTO member_preferences AS p (guild_id, user_id, extra) VALUES ($1, $2, jsonb_build_object($3::text, $4::jsonb))
ON CONFLICT (guild_id, user_id) DO UPDATE SET extra = p.extra || excluded.extra
RETURNING notifications, language, extra
"""
_RESET = "DELETE FROM member_preferences WHERE guild_id = $1 AND user_id = $2 RETURNING user_id"


class Verbs(Protocol):
    """What preferences need of `bot.db`."""

    async def fetchrow(self, sql: str, /, *args: Any) -> asyncpg.Record | None:
        """Return the first row, or None when there is none."""
        ...

    async def fetchval(self, sql: str, /, *args: Any) -> Any:
        """Return the first column of the first row, or None when there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Preferences:
    """What a member chose; None where they did not choose."""

    #: Whether the bot may notify them of its own accord.
    notifications: bool | None = None
    #: A language tag like `de` or `pt-BR`.
    language: str | None = None
    #: What cogs let them choose, by the cogs' own names.
    extra: dict[str, Any] = field(default_factory=dict)


class Unchanged:
    """Stands for what `put` shall leave as it is."""


UNCHANGED = Unchanged()


async def get(db: Verbs, guild_id: int, user_id: int) -> Preferences:
    """Return what a member chose in a guild; nothing is chosen when they never did."""
    row = await db.fetchrow(_GET, guild_id, user_id)
    return Preferences() if row is None else Preferences(**row)


async def put(
    db: Verbs,
    guild_id: int,
    user_id: int,
    *,
    notifications: bool | Unchanged | None = UNCHANGED,
    language: str | Unchanged | None = UNCHANGED,
) -> Preferences:
    """Store what a member chose and return all of it; None takes a choice back.

    Raises `ValidationError` for a language that is no tag.
    """
    row = await db.fetchrow(
        _SET,
        guild_id,
        user_id,
        None if isinstance(notifications, Unchanged) else notifications,
        None if isinstance(language, Unchanged) or language is None else language_tag(language),
        not isinstance(notifications, Unchanged),
        not isinstance(language, Unchanged),
    )
    assert row is not None, "an upsert returns its row"
    return Preferences(**row)


async def put_extra(db: Verbs, guild_id: int, user_id: int, name: str, value: Any) -> Preferences:
    """Store one choice of a cog's own, anything that is JSON, and return all of them."""
    row = await db.fetchrow(_SET_EXTRA, guild_id, user_id, scrub_payload(name), scrub_payload(value))
    assert row is not None, "an upsert returns its row"
    return Preferences(**row)


async def reset(db: Verbs, guild_id: int, user_id: int) -> bool:
    """Forget what a member chose in a guild, and tell whether they had chosen anything."""
    return await db.fetchval(_RESET, guild_id, user_id) is not None


def language_tag(text: str) -> str:
    """Return a language tag as it is usually written: `pt-br` becomes `pt-BR`. Raises `ValidationError`."""
    match = _LANGUAGE.fullmatch(text.strip().replace("_", "-"))
    if match is None:
        raise ValidationError(f"{text[:30]!r} is no language: expected a tag like en, de or pt-BR")
    language, script, region = match.groups()
    parts = [language.lower(), script and script.capitalize(), region and region.upper()]
    return "-".join(part for part in parts if part)
