"""Member requests (op 8): turning one into pages, one at a time, as the socket takes them."""

from __future__ import annotations

import json

from .entities import Guild
from .payloads import members_json

# https://docs.discord.com/developers/events/gateway-events#request-guild-members
_QUERY_LIMIT = 100
_NONCE_BYTES = 32


def clean_nonce(nonce: object) -> str | None:
    """Keep a nonce that Discord would echo; an invalid one is ignored."""
    return nonce if isinstance(nonce, str) and len(nonce.encode(errors="replace")) <= _NONCE_BYTES else None


class MemberRequest:
    """A full member request under way: it keeps the ids of its first moment, and renders each page when it is sent."""

    __slots__ = ("_ids", "_plan", "_size", "_tail", "count", "guild")

    def __init__(self, guild: Guild, nonce: str | None, page_size: int) -> None:
        self.guild = guild
        self._size = page_size
        self._ids = guild.ordered_member_ids()
        self.count = max(1, -(-len(self._ids) // page_size))
        self._plan = list(range(self.count))
        self._tail = _tail(nonce)

    @property
    def finished(self) -> bool:
        """Whether every planned page was taken."""
        return not self._plan

    def follow(self, plan: list[int]) -> None:
        """Send these pages in this order in place of all of them in order."""
        self._plan = plan

    def take_page(self) -> bytes:
        """Render the next page."""
        index = self._plan.pop(0)
        members = self.guild.members
        page = [members[i] for i in self._ids[index * self._size : (index + 1) * self._size] if i in members]
        return _page(self.guild.id, members_json(page), index, self.count, self._tail)


def query_page(guild: Guild, query: str, limit: int, nonce: str | None) -> bytes:
    """Answer a request by name prefix: one page of at most 100 members."""
    wanted = query.lower()
    found = [
        member
        for member in guild.members.values()
        if member.user.username.lower().startswith(wanted) or (member.nick or "").lower().startswith(wanted)
    ]
    limit = min(limit, _QUERY_LIMIT) if limit > 0 else _QUERY_LIMIT
    return _page(guild.id, members_json(found[:limit]), 0, 1, _tail(nonce))


def user_ids_page(guild: Guild, user_ids: list[int], nonce: str | None) -> bytes:
    """Answer a request for certain users: one page of at most 100, those who are no members in `not_found`."""
    wanted = user_ids[:_QUERY_LIMIT]
    found = [guild.members[user_id] for user_id in wanted if user_id in guild.members]
    missing = [str(user_id) for user_id in wanted if user_id not in guild.members]
    return _page(guild.id, members_json(found), 0, 1, _tail(nonce, missing))


def _tail(nonce: str | None, not_found: list[str] | None = None) -> bytes:
    missing = f',"not_found":{json.dumps(not_found)}' if not_found is not None else ""
    echo = f',"nonce":{json.dumps(nonce)}' if nonce is not None else ""
    return f"{missing}{echo}}}".encode("ascii")


def _page(guild_id: int, members: bytes, index: int, count: int, tail: bytes) -> bytes:
    head = b'{"guild_id":"%d","chunk_index":%d,"chunk_count":%d,"members":[' % (guild_id, index, count)
    return b"".join((head, members, b"]", tail))
