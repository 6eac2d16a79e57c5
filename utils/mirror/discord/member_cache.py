"""Fills discord.py's member cache from the mirror's listings, for MEMBER_CACHE=all, and keeps it right.

Written against discord.py 2.7.1; docs/explanation/architecture.md lists the private names used here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

import discord
from discord.utils import SnowflakeList

from utils.exceptions import SyncError
from utils.logs import log_once
from utils.mirror.translate.objects import MALFORMED, Payload, to_timestamp

_log = logging.getLogger(__name__)

#: Seconds after the end of a listing within which the gateway may still send a join or a leave that it showed.
LATE_SECONDS = 10.0

#: How long `Guild.chunk` waits for the mirror's listing, in seconds.
CHUNK_SECONDS = 300.0

#: Attribute of `discord.Member` by column of `members`.
_ATTRIBUTES = {
    "nick": "nick",
    "avatar": "_avatar",
    "roles": "_roles",
    "joined_at": "joined_at",
    "premium_since": "premium_since",
    "timed_out_until": "timed_out_until",
    "pending": "pending",
    "flags": "_flags",
}
#: What a listing shows of a member and the mirror has no column for.
_UNMIRRORED = ("_banner", "_avatar_decoration_data")
#: Fields that discord.py takes for null when a dispatch omits them, and the member's attribute.
_OMITTED_MEMBER = (
    ("premium_since", "premium_since"),
    ("communication_disabled_until", "timed_out_until"),
    ("avatar", "_avatar"),
    ("banner", "_banner"),
    ("flags", "_flags"),
    ("avatar_decoration_data", "_avatar_decoration_data"),
)
_OMITTED_USER = (
    ("username", "name"),
    ("discriminator", "discriminator"),
    ("avatar", "_avatar"),
    ("global_name", "global_name"),
    ("public_flags", "_public_flags"),
    ("avatar_decoration_data", "_avatar_decoration_data"),
    ("primary_guild", "_primary_guild"),
)


class LiveRow(Protocol):
    """What dispatches reported of one row since the listings that are under way were requested."""

    @property
    def stamp(self) -> int: ...

    def values_since(self, stamp: int) -> dict[str, Any]:
        """Return the columns that dispatches after `stamp` named."""


class LiveRows(Protocol):
    """Remembers dispatches while listings are under way: the overlay."""

    def covers(self, stamp: int) -> bool:
        """Return whether every dispatch after `stamp` is still remembered."""

    def rows(self, table: str, guild_id: int) -> Mapping[tuple[int, ...], LiveRow]:
        """Return the remembered rows of a guild by key; guild 0: users."""


class MemberCache:
    """Puts listed members into the cache of a client whose member cache flags include `joined`.

    discord.py maintains the cache from dispatches by itself; a listing changes it without dispatching events, like
    `Guild.chunk`. Rows that a dispatch named since the listing was requested keep what the dispatch said. An unexpected
    error is logged and leaves the cache incomplete; the mirror must not notice it.
    """

    def __init__(self, client: discord.Client, live: LiveRows) -> None:
        self._state = client._connection
        self._live = live
        self._wait_filled: Callable[[int], Awaitable[None]] | None = None
        #: The last listing of each guild, until `LATE_SECONDS` after its end.
        self._fills: dict[int, CacheFill] = {}

    def install(self, wait_filled: Callable[[int], Awaitable[None]]) -> None:
        """Let `Guild.chunk` wait for the mirror's listing: Discord refuses a second request, and discord.py would hang.

        `wait_filled` returns when a guild has been listed, or raises `SyncError`.
        """
        self._wait_filled = wait_filled
        self._state.chunk_guild = self._chunk  # type: ignore[method-assign, assignment]

    async def _chunk(self, guild: discord.Guild, *, cache: bool | None = None) -> list[discord.Member]:
        """Return the members of a guild once they are in the cache; see `Guild.chunk`.

        Raises `discord.ClientException` if they cannot be listed, or not within `CHUNK_SECONDS`.
        """
        if not guild.chunked and self._wait_filled is not None:
            try:
                async with asyncio.timeout(CHUNK_SECONDS):
                    await self._wait_filled(guild.id)
            except (SyncError, TimeoutError) as error:
                why = str(error) or f"its members were not listed within {CHUNK_SECONDS:g} s"
                raise discord.ClientException(f"could not chunk guild {guild.id}: {why}") from error
        return list(guild.members)

    def open(self, guild_id: int, stamp: int) -> CacheFill | None:
        """Return what takes the pages of a listing requested at `stamp`; None if discord.py does not know the guild.

        Never raises.
        """
        try:
            guild = self._state._get_guild(guild_id)
            if guild is None:
                return None
            fill = self._fills[guild_id] = CacheFill(guild, stamp, self._live, self._forget)
        except Exception as error:
            _report("be filled", error)
            return None
        return fill

    def prepare(self, name: str, data: Payload) -> None:
        """Prepare the cache for a dispatch that discord.py parses next. Never raises."""
        if name.startswith("GUILD_MEMBER_"):
            try:
                self._prepare(name, data)
            except Exception as error:
                _report(f"be prepared for {name}", error)

    def _prepare(self, name: str, data: Payload) -> None:
        guild = self._state._get_guild(int(data["guild_id"]))
        if guild is None:
            return
        member = guild._members.get(int(data["user"]["id"]))
        if name == "GUILD_MEMBER_UPDATE":
            _complete(data, member)
        elif name == "GUILD_MEMBER_ADD":
            if member is not None and self._is_unannounced(guild, member, data):
                del guild._members[member.id]  # discord.py ignores the join of a member whom it has
                _count(guild, -1)
        elif name == "GUILD_MEMBER_REMOVE" and member is None:
            fill = self._fills.get(guild.id)
            gone = None if fill is None else fill.gone.pop(int(data["user"]["id"]), None)
            if gone is not None:  # discord.py announces the leave of a member whom it has
                guild._members[gone.id] = gone
                _count(guild, +1)

    def _is_unannounced(self, guild: discord.Guild, member: discord.Member, data: Payload) -> bool:
        """Return whether a cached member joined anew, or was listed before the join was dispatched.

        Otherwise Discord repeats a join, as it sometimes does.
        """
        fill = self._fills.get(guild.id)
        was_listed = fill is not None and member.id in fill.new
        if fill is not None:
            fill.new.discard(member.id)
        return was_listed or member.joined_at != to_timestamp(data.get("joined_at"))

    def _forget(self, fill: CacheFill) -> None:
        """Forget a listing: the dispatches that it overtook have arrived."""
        if self._fills.get(fill.guild.id) is fill:
            del self._fills[fill.guild.id]


class CacheFill:
    """Takes the pages of one listing into the cache of its guild, until one cannot be taken. No method raises."""

    __slots__ = ("_has_failed", "_live", "_on_closed", "_stamp", "_unseen", "gone", "guild", "new")

    def __init__(
        self, guild: discord.Guild, stamp: int, live: LiveRows, on_closed: Callable[[CacheFill], None]
    ) -> None:
        """`on_closed` is called `LATE_SECONDS` after the end of the listing."""
        self.guild: discord.Guild = guild
        #: Ids of members whom only the listing has shown so far.
        self.new: set[int] = set()
        #: Members whom the listing proved to be gone, by id.
        self.gone: dict[int, discord.Member] = {}
        self._stamp = stamp
        self._live = live
        self._on_closed = on_closed
        self._has_failed: bool = False
        #: Ids of cached members whom no page has shown.
        self._unseen: set[int] = set(guild._members)

    def add(self, payloads: Sequence[Payload]) -> None:
        """Put a page into the cache; malformed members are left out."""
        if not self._has_failed:
            try:
                self._add_page(payloads)
            except Exception as error:
                self._fail(error)

    def _add_page(self, payloads: Sequence[Payload]) -> None:
        if not self._live.covers(self._stamp):  # the listing will be requested again
            return
        members = self._live.rows("members", self.guild.id)
        users = self._live.rows("users", 0)
        for payload in payloads:
            with contextlib.suppress(*MALFORMED):  # the mirror reports it
                self._add(payload, members, users)

    def finish(self, unreadable: Sequence[int | None]) -> None:
        """Remove members whom a complete listing did not show; `unreadable`: ids of malformed ones, None if unknown."""
        if not self._has_failed:  # otherwise it is not known whom the pages have shown
            try:
                self._remove_unseen(unreadable)
            except Exception as error:
                self._fail(error)

    def _remove_unseen(self, unreadable: Sequence[int | None]) -> None:
        guild, stamp = self.guild, self._stamp
        if None in unreadable or not self._live.covers(stamp):
            return
        members = self._live.rows("members", guild.id)
        guests = 0
        for user_id in self._unseen.difference(id for id in unreadable if id is not None):
            member, live = guild._members.get(user_id), members.get((guild.id, user_id))
            if member is None or (live is not None and live.stamp > stamp):
                continue
            if member.joined_at is None:  # in a voice channel only: guests are never listed
                guests += 1
            else:
                self.gone[user_id] = guild._members.pop(user_id)
        if not unreadable:
            guild._member_count = len(guild._members) - guests

    def close(self) -> None:
        """Release the listing a little later: the gateway may still send joins and leaves that it showed."""
        asyncio.get_running_loop().call_later(LATE_SECONDS, self._on_closed, self)

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        _report("be filled", error)

    def _add(
        self,
        payload: Payload,
        members: Mapping[tuple[int, ...], LiveRow],
        users: Mapping[tuple[int, ...], LiveRow],
    ) -> None:
        guild, state = self.guild, self.guild._state
        user = payload["user"]
        user_id = int(user["id"])
        self._unseen.discard(user_id)
        live: dict[str, Any] = {}
        if members and (row := members.get((guild.id, user_id))) is not None:
            live = row.values_since(self._stamp)
            if live.get("left_at") is not None:
                return
        is_known_user = user_id in state._users
        listed = discord.Member(data=payload, guild=guild, state=state)  # type: ignore[arg-type]
        if is_known_user and user_id != state.self_id and not _is_newer(users.get((user_id,)), self._stamp):
            listed._update_inner_user(user)
        member = guild._members.get(user_id)
        if member is None:
            for column, value in live.items():
                if column in _ATTRIBUTES:
                    setattr(listed, _ATTRIBUTES[column], SnowflakeList(value) if column == "roles" else value)
            guild._members[listed.id] = listed
            self.new.add(listed.id)
            return
        for column, attribute in _ATTRIBUTES.items():
            if column not in live:
                setattr(member, attribute, getattr(listed, attribute))
        if not live:
            for attribute in _UNMIRRORED:
                setattr(member, attribute, getattr(listed, attribute))


def _report(what: str, error: Exception) -> None:
    log_once(
        _log,
        (what, type(error).__name__),
        "discord.py's member cache could not %s (%r), so that cogs may miss members; further errors are only counted",
        what,
        error,
    )


def _is_newer(row: LiveRow | None, stamp: int) -> bool:
    return row is not None and row.stamp > stamp


def _count(guild: discord.Guild, difference: int) -> None:
    if guild._member_count is not None:
        guild._member_count += difference


def _complete(data: Payload, member: discord.Member | None) -> None:
    """Add the fields that a member update omits: they are unchanged, and discord.py would take them for null."""
    if member is None:
        data.setdefault("flags", 0)
        data.setdefault("roles", [])
        return
    for field, attribute in _OMITTED_MEMBER:
        if field not in data:
            data[field] = _as_sent(getattr(member, attribute))
    if "roles" not in data:
        data["roles"] = list(member._roles)
    if data.get("joined_at") is not None:
        member.joined_at = to_timestamp(data["joined_at"])
    user = data["user"]
    for field, attribute in _OMITTED_USER:
        if field not in user:
            user[field] = getattr(member._user, attribute)


def _as_sent(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
