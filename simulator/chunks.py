"""Member requests (op 8): renders GUILD_MEMBERS_CHUNK pages one at a time."""

from __future__ import annotations

import json

from .entities import Guild
from .payloads import members_json

# https://docs.discord.com/developers/events/gateway-events#request-guild-members
_QUERY_LIMIT = 100
_NONCE_BYTES = 32


def clean_nonce(nonce: object) -> str | None:
    """Return the nonce if Discord would echo it, otherwise None."""
    return nonce if isinstance(nonce, str) and len(nonce.encode(errors="replace")) <= _NONCE_BYTES else None


class MemberRequest:
    """A full member request in progress: keeps the member ids of its start and renders each page when it is sent."""

    __slots__ = ("_ids", "_order", "_size", "_tail", "count", "guild")

    def __init__(self, guild: Guild, nonce: str | None, page_size: int) -> None:
        self.guild = guild
        self._size = page_size
        self._ids = guild.ordered_member_ids()
        self.count = max(1, -(-len(self._ids) // page_size))
        self._order = list(range(self.count))
        self._tail = _tail(nonce)

    @property
    def finished(self) -> bool:
        """Whether all pages have been rendered."""
        return not self._order

    def set_page_order(self, order: list[int]) -> None:
        """Send the pages with these numbers, in this order."""
        self._order = order

    def take_page(self) -> bytes:
        """Render the next page."""
        index = self._order.pop(0)
        members = self.guild.members
        page = [members[i] for i in self._ids[index * self._size : (index + 1) * self._size] if i in members]
        return _page(self.guild.id, members_json(page), index, self.count, self._tail)


def query_page(guild: Guild, query: str, limit: int, nonce: str | None) -> bytes:
    """Render the response to a request by name prefix: one page of at most 100 members."""
    prefix = query.lower()
    found = [
        member
        for member in guild.members.values()
        if member.user.username.lower().startswith(prefix) or (member.nick or "").lower().startswith(prefix)
    ]
    limit = min(limit, _QUERY_LIMIT) if limit > 0 else _QUERY_LIMIT
    return _page(guild.id, members_json(found[:limit]), 0, 1, _tail(nonce))


def user_ids_page(guild: Guild, user_ids: list[int], nonce: str | None) -> bytes:
    """Render the response to a request by user id: one page of at most 100 members, others in `not_found`."""
    requested = user_ids[:_QUERY_LIMIT]
    found = [guild.members[user_id] for user_id in requested if user_id in guild.members]
    missing = [str(user_id) for user_id in requested if user_id not in guild.members]
    return _page(guild.id, members_json(found), 0, 1, _tail(nonce, missing))


def _tail(nonce: str | None, not_found: list[str] | None = None) -> bytes:
    missing = f',"not_found":{json.dumps(not_found)}' if not_found is not None else ""
    echo = f',"nonce":{json.dumps(nonce)}' if nonce is not None else ""
    return f"{missing}{echo}}}".encode("ascii")


def _page(guild_id: int, members: bytes, index: int, count: int, tail: bytes) -> bytes:
    head = b'{"guild_id":"%d","chunk_index":%d,"chunk_count":%d,"members":[' % (guild_id, index, count)
    return b"".join((head, members, b"]", tail))
