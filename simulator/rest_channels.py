"""REST routes of channels, threads and messages."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from aiohttp import web

from .entities import Channel, ChannelType, Json, Thread
from .ids import iso, to_micros
from .payloads import channel_payload, own_user_payload, thread_member_payload, thread_payload, user_payload
from .rest import (
    API,
    INVALID_FORM,
    MISSING_PERMISSIONS,
    UNKNOWN_MESSAGE,
    UNKNOWN_USER,
    ApiError,
    answer,
    number,
    path_id,
    read_body,
    visible_channel,
)

if TYPE_CHECKING:
    from .server import Simulator

_MAX_MESSAGES = 1000


class ChannelRoutes:
    """Routes under `/channels`; stores the bot's messages so that it can edit them."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._world = simulator.world
        self.sent: dict[int, Json] = {}

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of this class."""
        channel = f"{API}/channels/{{channel_id}}"
        return [
            web.get(channel, self.channel),
            web.get(f"{channel}/threads/archived/public", self.archived_public),
            web.get(f"{channel}/threads/archived/private", self.archived_private),
            web.get(f"{channel}/users/@me/threads/archived/private", self.archived_joined),
            web.post(f"{channel}/messages", self.send),
            web.get(f"{channel}/messages/{{message_id}}", self.message),
            web.patch(f"{channel}/messages/{{message_id}}", self.edit),
            web.delete(f"{channel}/messages/{{message_id}}", self.delete),
            web.put(f"{channel}/messages/{{message_id}}/reactions/{{emoji}}/@me", self.react),
            web.delete(f"{channel}/messages/{{message_id}}/reactions/{{emoji}}/@me", self.unreact),
            web.post(f"{channel}/typing", self.typing),
            web.post(f"{API}/users/@me/channels", self.open_direct),
        ]

    async def channel(self, request: web.Request) -> web.Response:
        _, channel = visible_channel(self._simulator, request)
        if isinstance(channel, Thread):
            return answer(thread_payload(channel, self._world.bot.id))
        return answer(channel_payload(channel))

    async def archived_public(self, request: web.Request) -> web.Response:
        return self._archived(request, private=False)

    async def archived_private(self, request: web.Request) -> web.Response:
        return self._archived(request, private=True)

    async def archived_joined(self, request: web.Request) -> web.Response:
        threads = [t for t in self._archive(request, private=True, joined=True) if t.joined]
        before = number(request, "before", 1 << 63, 0, 1 << 64)
        threads = sorted((t for t in threads if t.id < before), key=lambda thread: -thread.id)
        return self._listing(request, threads)

    def _archived(self, request: web.Request, *, private: bool) -> web.Response:
        threads = self._archive(request, private=private)
        text = request.query.get("before")
        if text is not None:
            try:
                before = to_micros(datetime.fromisoformat(text))
            except ValueError:
                raise ApiError(*INVALID_FORM) from None
            threads = [t for t in threads if t.archive_timestamp < before]
        return self._listing(request, sorted(threads, key=lambda thread: -thread.archive_timestamp))

    def _archive(self, request: web.Request, *, private: bool, joined: bool = False) -> list[Thread]:
        guild, channel = visible_channel(self._simulator, request)
        if not isinstance(channel, Channel):
            raise ApiError(400, 50024, "Cannot execute action on this channel type")
        if not guild.may_list_archived(channel.id, private=private and not joined):
            raise ApiError(*MISSING_PERMISSIONS)
        return [
            thread
            for thread in guild.threads.values()
            if thread.parent_id == channel.id
            and thread.archived
            and (thread.type == ChannelType.PRIVATE_THREAD) == private
        ]

    def _listing(self, request: web.Request, threads: list[Thread]) -> web.Response:
        limit = number(request, "limit", 50, 2, 100)
        shown, bot_id = threads[:limit], self._world.bot.id
        joined = [thread_member_payload(thread, bot_id) for thread in shown if thread.joined]
        listed = [thread_payload(thread, bot_id) for thread in shown]
        return answer({"threads": listed, "members": joined, "has_more": len(threads) > limit})

    async def send(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        content = str(body.get("content") or "")
        channel_id = path_id(request, "channel_id")
        if channel_id in self._world.direct_channels:
            message_id = self._world.direct_message(self._world.direct_channels[channel_id], content, is_from_bot=True)
        else:
            guild, _ = visible_channel(self._simulator, request)
            message_id = self._world.message(guild.id, channel_id, self._world.bot.id, content)
        message = self._render(message_id, channel_id, body)
        self.sent[message_id] = message
        if len(self.sent) > _MAX_MESSAGES:
            del self.sent[next(iter(self.sent))]
        return answer(message)

    async def message(self, request: web.Request) -> web.Response:
        return answer(self._sent(request))

    async def edit(self, request: web.Request) -> web.Response:
        message = self._sent(request)
        body = await read_body(request)
        message |= {key: body[key] for key in ("content", "embeds", "flags", "components") if key in body}
        message["edited_timestamp"] = iso(self._world.now_us)
        return answer(message)

    async def delete(self, request: web.Request) -> web.Response:
        del self.sent[int(self._sent(request)["id"])]
        return web.Response(status=204)

    async def react(self, request: web.Request) -> web.Response:
        self._world.react(*self._reaction(request))
        return web.Response(status=204)

    async def unreact(self, request: web.Request) -> web.Response:
        self._world.unreact(*self._reaction(request))
        return web.Response(status=204)

    def _reaction(self, request: web.Request) -> tuple[int | None, int, int, int, str]:
        """Return the guild (None: direct messages), the channel, the message, the bot and the emoji."""
        channel_id, message_id = path_id(request, "channel_id"), path_id(request, "message_id")
        guild_id = (
            None if channel_id in self._world.direct_channels else visible_channel(self._simulator, request)[0].id
        )
        return guild_id, channel_id, message_id, self._world.bot.id, request.match_info["emoji"]

    async def typing(self, request: web.Request) -> web.Response:
        return web.Response(status=204)

    async def open_direct(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        recipient = self._world.users.get(int(body.get("recipient_id") or 0))
        if recipient is None:
            raise ApiError(*UNKNOWN_USER)
        return answer(self.direct_channel(recipient.id))

    def direct_channel(self, user_id: int) -> Json:
        """Render the direct-message channel between the bot and a user; its id is derived from the user's."""
        channel_id = self._world.open_direct(user_id)
        recipient = user_payload(self._world.user(user_id))
        return {"id": str(channel_id), "type": 1, "last_message_id": None, "recipients": [recipient], "flags": 0}

    def _sent(self, request: web.Request) -> Json:
        message = self.sent.get(path_id(request, "message_id"))
        if message is None or message["channel_id"] != request.match_info["channel_id"]:
            raise ApiError(*UNKNOWN_MESSAGE)
        return message

    def _render(self, message_id: int, channel_id: int, body: Json) -> Json:
        return {
            "id": str(message_id),
            "channel_id": str(channel_id),
            "type": 0,
            "author": own_user_payload(self._world.bot),
            "content": str(body.get("content") or ""),
            "embeds": body.get("embeds") or [],
            "components": body.get("components") or [],
            "flags": int(body.get("flags") or 0),
            "timestamp": iso(self._world.now_us),
            "edited_timestamp": None,
            "tts": False,
            "mention_everyone": False,
            "mentions": [],
            "mention_roles": [],
            "attachments": [],
            "pinned": False,
        }
