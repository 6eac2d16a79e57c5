"""Member preferences per guild, for /preferences and for cogs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from utils.database import Pool
from utils.database.access import Database
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


@dataclass(frozen=True, slots=True)
class Preferences:
    """A member's preferences in one guild; None means not chosen."""

    #: Whether the bot may send unsolicited notifications.
    notifications: bool | None = None
    #: A language tag like `de` or `pt-BR`.
    language: str | None = None
    #: Preferences of cogs, by name.
    extra: dict[str, Any] = field(default_factory=dict)


class Unchanged:
    """The type of `UNCHANGED`, the mark of a preference that `put` does not change."""


UNCHANGED = Unchanged()


async def get(db: Database | Pool, guild_id: int, user_id: int) -> Preferences:
    """Return a member's preferences in a guild; all None if they never chose any."""
    row = await db.fetchrow(_GET, guild_id, user_id)
    return Preferences() if row is None else Preferences(**row)


async def put(
    db: Database | Pool,
    guild_id: int,
    user_id: int,
    *,
    notifications: bool | Unchanged | None = UNCHANGED,
    language: str | Unchanged | None = UNCHANGED,
) -> Preferences:
    """Store preferences and return all of the member's preferences; None resets one.

    Raises `ValidationError` for a language that is not a language tag.
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


async def put_extra(db: Database | Pool, guild_id: int, user_id: int, name: str, value: Any) -> Preferences:
    """Store one preference of a cog, any JSON value, and return all of the member's preferences."""
    row = await db.fetchrow(_SET_EXTRA, guild_id, user_id, scrub_payload(name), scrub_payload(value))
    assert row is not None, "an upsert returns its row"
    return Preferences(**row)


async def reset(db: Database | Pool, guild_id: int, user_id: int) -> bool:
    """Delete a member's preferences in a guild and return whether there were any."""
    return await db.fetchval(_RESET, guild_id, user_id) is not None


def language_tag(text: str) -> str:
    """Normalize a language tag: `pt-br` becomes `pt-BR`. Raises `ValidationError` for anything else."""
    match = _LANGUAGE.fullmatch(text.strip().replace("_", "-"))
    if match is None:
        raise ValidationError(f"{text[:30]!r} is not a language tag: use one like en, de or pt-BR")
    language, script, region = match.groups()
    parts = [language.lower(), script and script.capitalize(), region and region.upper()]
    return "-".join(part for part in parts if part)
