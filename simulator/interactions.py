"""Interactions: registered commands, what users do with them, and the bot's responses."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .entities import Json
from .ids import snowflake_at
from .interaction_payloads import (
    component_payload,
    interaction_payload,
    menu_payload,
    message_payload,
    modal_payload,
)
from .rest import (
    ALREADY_ACKNOWLEDGED,
    API,
    INVALID_FORM,
    INVALID_WEBHOOK_TOKEN,
    UNKNOWN_INTERACTION,
    UNKNOWN_MESSAGE,
    UNKNOWN_WEBHOOK,
    ApiError,
    answer,
    path_id,
    read_body,
)

if TYPE_CHECKING:
    from .server import Simulator

# https://docs.discord.com/developers/interactions/receiving-and-responding
RESPONSE_DEADLINE_S = 3.0
TOKEN_LIFETIME_S = 15 * 60.0
_EPHEMERAL = 1 << 6
_LOADING = 1 << 7
_DEFERRALS = (5, 6)
# Responses of a component that update its message: deferred and immediate.
_DEFERRED_UPDATE, _UPDATE = 6, 7
_MODAL = 9
#: Choices of an autocomplete.
_MAX_CHOICES = 25
# Types of interactions, and the types of responses that each may get.
_COMMAND, _COMPONENT, _AUTOCOMPLETE, _SUBMIT = 2, 3, 4, 5
_ALLOWED = {
    _COMMAND: (4, 5, _MODAL),
    _COMPONENT: (4, 5, _DEFERRED_UPDATE, _UPDATE, _MODAL),
    _AUTOCOMPLETE: (8,),
    _SUBMIT: (4, 5),
}
_MAX_RESULTS = 1000


@dataclass(slots=True)
class Edit:
    """One version of a reply; `at` is in seconds after the command was run."""

    at: float
    content: str
    embeds: list[Json]


@dataclass(slots=True, repr=False)
class InteractionResult:
    """The bot's response to one interaction: its first response, then every edit in order."""

    id: int
    token: str
    started: float
    type: int | None = None
    deferred: bool = False
    ephemeral: bool = False
    content: str | None = None
    embeds: list[Json] = field(default_factory=list)
    answered_after: float | None = None
    edits: list[Edit] = field(default_factory=list)
    followups: list[Json] = field(default_factory=list)
    message: Json | None = None
    choices: list[Json] | None = None
    #: The form that the bot opened in response: its custom id, title and components.
    modal: Json | None = None
    #: Attached files by name, the latest version of each.
    files: dict[str, bytes] = field(default_factory=dict)
    user_id: int = 0
    guild_id: int | None = None
    #: 2: a command, 3: a component, 4: an autocomplete request, 5: a submitted form.
    kind: int = _COMMAND
    #: For a component: the result whose reply contains it. For a submitted form: the result that opened it.
    parent: InteractionResult | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __repr__(self) -> str:
        shown = [repr(text) for text in self.texts] or ["deferred" if self.deferred else "no answer"]
        shown += ["ephemeral"] if self.ephemeral else []
        shown += [] if self.modal is None else [f"form {self.modal.get('title')!r}"]
        shown += [] if self.choices is None else [f"choices {', '.join(str(it.get('name')) for it in self.choices)}"]
        shown += [f"buttons {', '.join(self.buttons)}"] if self.buttons else []
        return f"<InteractionResult {'; '.join(shown)}>"

    @property
    def final_content(self) -> str | None:
        """The reply's current text; None if there is none yet."""
        if self.edits:
            return self.edits[-1].content
        return self.content

    @property
    def texts(self) -> list[str]:
        """All texts that the user was shown, in order; those of one kind (reply, edits, follow-ups) come together."""
        reply = [self.content] if self.content else []
        found = [*reply, *(edit.content for edit in self.edits), *(str(it["content"]) for it in self.followups)]
        return [text for text in found if text]

    @property
    def source(self) -> InteractionResult | None:
        """The result whose reply a component, or the form opened by it, may update; None for all others."""
        if self.kind == _SUBMIT:
            return None if self.parent is None else self.parent.source
        return self.parent if self.kind == _COMPONENT else None

    @property
    def buttons(self) -> dict[str, str]:
        """The enabled buttons of the reply: custom id by label."""
        rows = (self.message or {}).get("components") or []
        found = [button for row in rows for button in row.get("components", []) if not button.get("disabled")]
        return {str(button.get("label")): button["custom_id"] for button in found if "custom_id" in button}

    @property
    def done(self) -> bool:
        """Whether there is a response other than a deferral, an edit or a follow-up."""
        return (self.type is not None and not self.deferred) or bool(self.edits) or bool(self.followups)

    async def wait_done(
        self, timeout: float = 10.0, until: Callable[[InteractionResult], bool] | None = None
    ) -> InteractionResult:
        """Wait until `done`, or until `until` returns true for the result.

        Raises TimeoutError with the result so far.
        """
        condition = until or (lambda result: result.done)
        try:
            async with asyncio.timeout(timeout):
                while not condition(self):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"not done after {timeout} s: {self!r}") from None
        return self

    def notify(self) -> None:
        """Wake waiting tasks."""
        self._changed.set()


class InteractionRoutes:
    """Routes of application commands, interaction callbacks and webhooks with replies."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._world = simulator.world
        self._registered: dict[int | None, list[Json]] = {}
        self._by_token: dict[str, InteractionResult] = {}
        self._number = 0
        self.syncs: Counter[int | None] = Counter()
        self.response_deadline = RESPONSE_DEADLINE_S
        self.token_lifetime = TOKEN_LIFETIME_S
        #: The languages of users' clients; those of others are en-US.
        self.locales: dict[int, str] = {}
        #: How far the time of interactions is ahead of this machine's clock, in seconds.
        self.clock_offset = 0.0

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of this class."""
        global_commands = f"{API}/applications/{{application_id}}/commands"
        guild = f"{API}/applications/{{application_id}}/guilds/{{guild_id}}/commands"
        webhook = f"{API}/webhooks/{{application_id}}/{{token}}"
        message = f"{webhook}/messages/{{message_id}}"
        routes = [web.post(f"{API}/interactions/{{interaction_id}}/{{token}}/callback", self.callback)]
        for base in (global_commands, guild):
            routes += [web.get(base, self.list_commands), web.put(base, self.overwrite), web.post(base, self.upsert)]
        routes += [web.post(webhook, self.follow_up), web.get(message, self.read)]
        return [*routes, web.patch(message, self.edit), web.delete(message, self.delete)]

    def commands(self, guild_id: int | None = None) -> list[Json]:
        """List the commands registered for a guild, or globally."""
        return list(self._registered.get(guild_id, []))

    def run(
        self,
        name: str,
        user_id: int,
        guild_id: int | None,
        channel_id: int | None,
        path: list[str],
        options: dict[str, Any],
    ) -> InteractionResult:
        """Send INTERACTION_CREATE for a registered command."""
        command = self._find(name, guild_id)
        result = self._new_result(user_id, guild_id)
        payload = interaction_payload(
            self._simulator, command, result.id, result.token, user_id, guild_id, channel_id, path, options
        )
        return self._dispatch(result, payload)

    def run_menu(
        self, name: str, user_id: int, guild_id: int | None, target_id: int, message: Json | None
    ) -> InteractionResult:
        """Send INTERACTION_CREATE for a context menu of a user, or of a message (its id, author_id and content)."""
        command = self._find(name, guild_id, 2 if message is None else 3)
        result = self._new_result(user_id, guild_id)
        payload = menu_payload(self._simulator, command, result.id, result.token, user_id, guild_id, target_id, message)
        return self._dispatch(result, payload)

    def complete(
        self,
        name: str,
        user_id: int,
        guild_id: int | None,
        path: list[str],
        focused: str,
        options: dict[str, Any],
    ) -> InteractionResult:
        """Send INTERACTION_CREATE for what a user has typed into the option `focused` so far."""
        command = self._find(name, guild_id)
        result = self._new_result(user_id, guild_id, _AUTOCOMPLETE)
        payload = interaction_payload(
            self._simulator, command, result.id, result.token, user_id, guild_id, None, path, options, focused
        )
        return self._dispatch(result, payload)

    def press(
        self, parent: InteractionResult, custom_id: str, user_id: int, values: list[str] | None = None
    ) -> InteractionResult:
        """Send INTERACTION_CREATE for a button of a reply, or for a menu of it in which `values` were selected.

        A button may have been removed, as clients may still show it.
        """
        if parent.message is None:
            raise LookupError("there is no reply yet, so there is no button")
        result = self._new_result(user_id, parent.guild_id, _COMPONENT)
        result.parent = parent
        payload = component_payload(
            self._simulator, parent.message, custom_id, result.id, result.token, user_id, parent.guild_id, values
        )
        return self._dispatch(result, payload)

    def submit(self, parent: InteractionResult, fields: dict[str, str], user_id: int) -> InteractionResult:
        """Send INTERACTION_CREATE for a form that the bot opened; `fields` are the texts by custom id or label."""
        if parent.modal is None:
            raise LookupError("the bot has opened no form in response")
        result = self._new_result(user_id, parent.guild_id, _SUBMIT)
        result.parent = parent
        source = result.source
        payload = modal_payload(
            self._simulator, parent.modal, fields, result.id, result.token, user_id, parent.guild_id,
            None if source is None else source.message,
        )  # fmt: skip
        return self._dispatch(result, payload)

    def _new_result(self, user_id: int, guild_id: int | None, kind: int = _COMMAND) -> InteractionResult:
        self._number += 1
        # Libraries derive an interaction's age from its id, so it must use the real time.
        now_us = time.time_ns() // 1000 + round(self.clock_offset * 1e6)
        id = snowflake_at(now_us, self._number & 0xFFF)
        token = secrets.token_hex(32)
        return InteractionResult(id, token, time.monotonic(), user_id=user_id, guild_id=guild_id, kind=kind)

    def _dispatch(self, result: InteractionResult, payload: Json) -> InteractionResult:
        guild_id = result.guild_id
        if self._simulator.gateway.dispatch(guild_id, "INTERACTION_CREATE", payload) == 0:
            raise LookupError("no client is connected that could receive the command")
        self._by_token[result.token] = result
        if len(self._by_token) > _MAX_RESULTS:
            del self._by_token[next(iter(self._by_token))]
        return result

    def _find(self, name: str, guild_id: int | None, kind: int = 1) -> Json:
        own = [] if guild_id is None else self._registered.get(guild_id, [])
        for command in own:
            if command["name"] == name and command["type"] == kind:
                return command
        for command in self._registered.get(None, []):
            contexts = command.get("contexts")
            context = 1 if guild_id is None else 0
            is_available = contexts is None or context in contexts
            if guild_id is None and command.get("dm_permission") is False:
                is_available = False
            if command["name"] == name and command["type"] == kind and is_available:
                return command
        known = sorted(c["name"] for c in [*own, *self._registered.get(None, [])])
        place = "direct messages" if guild_id is None else f"guild {guild_id}"
        sought = f"command /{name}" if kind == 1 else f"context menu {name!r}"
        raise LookupError(f"no {sought} is registered for {place}; registered: {', '.join(known) or 'none'}")

    # Registration.

    async def list_commands(self, request: web.Request) -> web.Response:
        return answer(self.commands(self._scope(request)))

    async def overwrite(self, request: web.Request) -> web.Response:
        scope = self._scope(request)
        try:
            commands = await request.json()
        except ValueError:
            raise ApiError(*INVALID_FORM) from None
        if not isinstance(commands, list):
            raise ApiError(*INVALID_FORM)
        self.syncs[scope] += 1
        self._registered[scope] = [self._complete(command, scope) for command in commands]
        return answer(self._registered[scope])

    async def upsert(self, request: web.Request) -> web.Response:
        scope, command = self._scope(request), self._complete(await read_body(request), self._scope(request))
        key = (command["name"], command["type"])
        others = [c for c in self._registered.get(scope, []) if (c["name"], c["type"]) != key]
        self._registered[scope] = [*others, command]
        return answer(command, 201)

    def _scope(self, request: web.Request) -> int | None:
        return path_id(request, "guild_id") if "guild_id" in request.match_info else None

    def _complete(self, command: Json, scope: int | None) -> Json:
        if not isinstance(command, dict) or not isinstance(command.get("name"), str):
            raise ApiError(*INVALID_FORM)
        known = {(c["name"], c["type"]): c["id"] for c in self._registered.get(scope, [])}
        defaults: Json = {
            "type": 1,
            "options": [],
            "description": "",
            "default_member_permissions": None,
            "nsfw": False,
        }
        defaults |= {"dm_permission": True, "contexts": None, "integration_types": [0]}
        ids: Json = {
            "id": known.get((command["name"], command.get("type", 1))) or str(self._world.new_id()),
            "version": str(self._world.new_id()),
        }
        ids["application_id"] = str(self._world.application_id)
        return defaults | command | ids | ({} if scope is None else {"guild_id": str(scope)})

    # Responses.

    async def callback(self, request: web.Request) -> web.Response:
        result = self._by_token.get(request.match_info["token"])
        body = await read_body(request)
        now = time.monotonic()
        if result is None or str(result.id) != request.match_info["interaction_id"]:
            raise ApiError(*UNKNOWN_INTERACTION)
        if result.type is not None:
            raise ApiError(*ALREADY_ACKNOWLEDGED)
        if now - result.started > self.response_deadline:
            raise ApiError(*UNKNOWN_INTERACTION)
        data = body.get("data") or {}
        allowed = _ALLOWED[result.kind]
        if result.kind == _SUBMIT and result.source is not None:
            allowed = (*allowed, _DEFERRED_UPDATE, _UPDATE)
        if body.get("type") not in allowed:
            raise ApiError(*INVALID_FORM)
        if len(data.get("choices") or ()) > _MAX_CHOICES:
            raise ApiError(400, 50035, "Invalid Form Body: data.choices: Must be 25 or fewer in length.")
        result.type = int(body["type"])
        result.deferred = result.type in _DEFERRALS
        result.ephemeral = bool(int(data.get("flags") or 0) & _EPHEMERAL)
        result.answered_after = now - result.started
        result.choices = data.get("choices")
        result.modal = data if result.type == _MODAL else None
        if not result.deferred:
            result.content, result.embeds = str(data.get("content") or ""), data.get("embeds") or []
        flags = int(data.get("flags") or 0) | (_LOADING if result.deferred else 0)
        if result.source is not None and result.type in (_DEFERRED_UPDATE, _UPDATE):
            result.message = result.source.message
            if result.type == _UPDATE:
                self._change(result.source, data)
        else:
            result.message = message_payload(self._simulator, data | {"flags": flags})
        result.files |= await _files(request)
        result.notify()
        if request.query.get("with_response", "").lower() not in ("1", "true"):
            return web.Response(status=204)
        shown = result.message or {}
        about: Json = {"id": str(result.id), "type": 2, "response_message_id": shown.get("id")}
        about |= {"response_message_loading": result.deferred, "response_message_ephemeral": result.ephemeral}
        return answer({"interaction": about, "resource": {"type": result.type, "message": result.message}})

    async def read(self, request: web.Request) -> web.Response:
        return answer(self._message(self._result(request), request))

    async def edit(self, request: web.Request) -> web.Response:
        result = self._result(request)
        message = self._message(result, request)
        body = await read_body(request)
        result.files |= await _files(request)
        if message is result.message:
            self._change(result, body)
        else:
            _update(message, body)
            result.notify()
        return answer(message)

    def _change(self, result: InteractionResult, body: Json) -> None:
        """Edit a reply and record the new version."""
        assert result.message is not None
        _update(result.message, body)
        at = time.monotonic() - result.started
        result.edits.append(Edit(at, result.message["content"], list(result.message["embeds"] or [])))
        result.notify()

    async def delete(self, request: web.Request) -> web.Response:
        result = self._result(request)
        message = self._message(result, request)
        if message is result.message:
            result.message = None
        else:
            result.followups.remove(message)
        return web.Response(status=204)

    async def follow_up(self, request: web.Request) -> web.Response:
        result = self._result(request)
        if result.type is None:
            raise ApiError(*UNKNOWN_WEBHOOK)
        body = await read_body(request)
        message = message_payload(self._simulator, body)
        if result.deferred and not result.edits and not result.followups and result.message is not None:
            # The first follow-up after a deferral becomes the reply.
            message["id"], message["flags"] = result.message["id"], result.message["flags"] & ~_LOADING
            result.message = message
            at = time.monotonic() - result.started
            result.edits.append(Edit(at, message["content"], message["embeds"]))
        else:
            result.followups.append(message)
        result.notify()
        return answer(message)

    def _result(self, request: web.Request) -> InteractionResult:
        result = self._by_token.get(request.match_info["token"])
        if result is None:
            raise ApiError(*UNKNOWN_WEBHOOK)
        if time.monotonic() - result.started > self.token_lifetime:
            raise ApiError(*INVALID_WEBHOOK_TOKEN)
        return result

    def _message(self, result: InteractionResult, request: web.Request) -> Json:
        message_id = request.match_info["message_id"]
        if result.message is not None and message_id in ("@original", result.message["id"]):
            return result.message
        for message in result.followups:
            if message["id"] == message_id:
                return message
        raise ApiError(*UNKNOWN_MESSAGE)


def _update(message: Json, body: Json) -> None:
    message |= {key: body[key] for key in ("content", "embeds", "components") if key in body}
    message["content"] = message["content"] or ""
    message["flags"] &= ~_LOADING
    message["edited_timestamp"] = message["timestamp"]


async def _files(request: web.Request) -> dict[str, bytes]:
    """Return the files of a multipart form, which aiohttp parses once and caches."""
    if not request.content_type.startswith("multipart/"):
        return {}
    fields = (await request.post()).values()
    return {field.filename: field.file.read() for field in fields if isinstance(field, web.FileField)}
