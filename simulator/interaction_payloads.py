"""Renders interactions: the command, its options and the objects they refer to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .entities import Json
from .ids import iso, snowflake_at
from .payloads import channel_payload, member_payload, own_user_payload, role_payload, thread_payload, user_payload

if TYPE_CHECKING:
    from .server import Simulator

_ALL_PERMISSIONS = (1 << 50) - 1
_USER, _CHANNEL, _ROLE, _MENTIONABLE = 6, 7, 8, 9


def interaction_payload(
    simulator: Simulator,
    command: Json,
    interaction_id: int,
    token: str,
    user_id: int,
    guild_id: int | None,
    channel_id: int | None,
    path: list[str],
    options: dict[str, Any],
    focused: str | None = None,
) -> Json:
    """Render INTERACTION_CREATE for a slash command; `path` names its subcommand group and subcommand.

    `focused`: the option that is being typed, whose text so far is in `options`; None: the command is used.
    """
    data = _command_data(command)
    data["options"] = _options(simulator, command, path, options, guild_id, data["resolved"], focused)
    kind = 2 if focused is None else 4
    return _envelope(simulator, kind, data, interaction_id, token, user_id, guild_id, channel_id)


def menu_payload(
    simulator: Simulator,
    command: Json,
    interaction_id: int,
    token: str,
    user_id: int,
    guild_id: int | None,
    target_id: int,
    message: Json | None,
) -> Json:
    """Render INTERACTION_CREATE for a context menu of a user, or of a message (`author_id`, `content`)."""
    data = _command_data(command) | {"target_id": str(target_id)}
    resolved = data["resolved"]
    payload = _envelope(simulator, 2, data, interaction_id, token, user_id, guild_id, None)
    if message is None:
        _value(simulator, _USER, target_id, guild_id, resolved)
    else:
        shown = message_payload(simulator, {"content": message.get("content")})
        author = user_payload(simulator.world.user(int(message["author_id"])))
        shown |= {"id": str(target_id), "channel_id": payload["channel_id"], "type": 0, "author": author}
        del shown["webhook_id"], shown["application_id"]
        resolved["messages"] = {str(target_id): shown}
    return payload


def _command_data(command: Json) -> Json:
    data: Json = {"id": command["id"], "name": command["name"], "type": command["type"], "resolved": {}}
    return data | ({"guild_id": command["guild_id"]} if "guild_id" in command else {})


def component_payload(
    simulator: Simulator,
    message: Json,
    custom_id: str,
    interaction_id: int,
    token: str,
    user_id: int,
    guild_id: int | None,
    values: list[str] | None = None,
) -> Json:
    """Render INTERACTION_CREATE for a button of a message, or for a menu in which `values` were selected."""
    found = find_component(message.get("components") or [], custom_id)
    resolved: Json = {}
    data: Json = {"component_type": 2 if found is None else found["type"], "custom_id": custom_id}
    if values is not None:
        if found is None:
            raise LookupError(f"the reply has no menu {custom_id!r}")
        kind = {5: _USER, 6: _ROLE, 7: _MENTIONABLE, 8: _CHANNEL}.get(found["type"], 0)
        data |= {"values": [str(_value(simulator, kind, value, guild_id, resolved)) for value in values]}
        data["resolved"] = resolved
    payload = _envelope(simulator, 3, data, interaction_id, token, user_id, guild_id, None)
    return payload | {"message": message | {"channel_id": payload["channel_id"]}}


def modal_payload(
    simulator: Simulator,
    modal: Json,
    fields: dict[str, str],
    interaction_id: int,
    token: str,
    user_id: int,
    guild_id: int | None,
    message: Json | None,
) -> Json:
    """Render INTERACTION_CREATE for a form; `fields` are its texts by custom id or label, `message` where it began."""
    unused = set(fields)

    def filled(component: Json, label: str | None = None) -> Json:
        if "component" in component:
            return {"type": component["type"], "component": filled(component["component"], component.get("label"))}
        if "components" in component:
            return {"type": component["type"], "components": [filled(inner) for inner in component["components"]]}
        names = (component.get("custom_id"), label or component.get("label"))
        name = next((name for name in names if name in fields), None)
        unused.discard(str(name))
        text = component.get("value") or "" if name is None else fields[name]
        return {"type": component["type"], "custom_id": component.get("custom_id"), "value": text}

    data: Json = {"custom_id": modal["custom_id"], "components": [filled(it) for it in modal["components"]]}
    if unused:
        raise LookupError(f"the form {modal.get('title')!r} has no field {', '.join(sorted(unused))}")
    payload = _envelope(simulator, 5, data, interaction_id, token, user_id, guild_id, None)
    return payload if message is None else payload | {"message": message | {"channel_id": payload["channel_id"]}}


def find_component(components: list[Json], custom_id: str) -> Json | None:
    """Return the component with a custom id, at any depth; None if there is none."""
    for component in components:
        if component.get("custom_id") == custom_id:
            return component
        inner = [*component.get("components", []), *filter(None, [component.get("accessory")])]
        if (found := find_component(inner, custom_id)) is not None:
            return found
    return None


def _envelope(
    simulator: Simulator,
    kind: int,
    data: Json,
    interaction_id: int,
    token: str,
    user_id: int,
    guild_id: int | None,
    channel_id: int | None,
) -> Json:
    world = simulator.world
    payload: Json = {
        "id": str(interaction_id),
        "application_id": str(world.application_id),
        "type": kind,
        "token": token,
        "version": 1,
        "data": data,
        "locale": simulator.interactions.locales.get(user_id, "en-US"),
        "app_permissions": str(_ALL_PERMISSIONS),
        "entitlements": [],
        "attachment_size_limit": 10 << 20,
        "authorizing_integration_owners": {"0": str(guild_id or 0)},
        "context": 1 if guild_id is None else 0,
    }
    if guild_id is None:
        channel = simulator.channels.direct_channel(user_id)
        return payload | {"user": user_payload(world.user(user_id)), "channel": channel, "channel_id": channel["id"]}
    guild = world.guild(guild_id)
    if channel_id is None:
        channel_id = next((c.id for c in guild.channels.values() if c.type == 0 and not c.hidden), None)
    if channel_id is None:
        raise LookupError(f"guild {guild_id} has no text channel that the bot can view")
    permissions = guild.permissions_of(user_id, channel_id)
    member = member_payload(world.member(guild_id, user_id)) | {"permissions": str(permissions)}
    partial = {"id": str(guild_id), "locale": guild.preferred_locale, "features": guild.features}
    payload |= {"guild_id": str(guild_id), "guild": partial, "guild_locale": guild.preferred_locale}
    payload["app_permissions"] = str(guild.granted(channel_id))
    return payload | {
        "member": member,
        "channel": _channel(simulator, guild_id, channel_id),
        "channel_id": str(channel_id),
    }


def message_payload(simulator: Simulator, body: Json) -> Json:
    """Render the message created by a response to an interaction."""
    now_us = time.time_ns() // 1000
    world = simulator.world
    return {
        "id": str(snowflake_at(now_us, world.rng.getrandbits(12))),
        "channel_id": "0",
        "type": 20,
        "author": own_user_payload(world.bot),
        "application_id": str(world.application_id),
        "webhook_id": str(world.application_id),
        "content": str(body.get("content") or ""),
        "embeds": body.get("embeds") or [],
        "components": body.get("components") or [],
        "flags": int(body.get("flags") or 0),
        "timestamp": iso(now_us),
        "edited_timestamp": None,
        "tts": False,
        "mention_everyone": False,
        "mentions": [],
        "mention_roles": [],
        "attachments": [],
        "pinned": False,
    }


def _channel(simulator: Simulator, guild_id: int, channel_id: int) -> Json:
    world = simulator.world
    thread = world.guild(guild_id).threads.get(channel_id)
    if thread is not None:
        return thread_payload(thread, world.bot.id) | {"permissions": str(_ALL_PERMISSIONS)}
    return channel_payload(world.channel(guild_id, channel_id)) | {"permissions": str(_ALL_PERMISSIONS)}


def _options(
    simulator: Simulator,
    command: Json,
    path: list[str],
    given: dict[str, Any],
    guild_id: int | None,
    resolved: Json,
    focused: str | None = None,
) -> list[Json]:
    known = {option["name"]: option for option in command.get("options") or []}
    if path:
        if path[0] not in known or known[path[0]]["type"] not in (1, 2):
            raise LookupError(f"/{command['name']} has no subcommand {path[0]!r}: it has {', '.join(known) or 'none'}")
        inner = _options(simulator, known[path[0]], path[1:], given, guild_id, resolved, focused)
        return [{"name": path[0], "type": known[path[0]]["type"], "options": inner}]
    missing = [name for name, option in known.items() if option.get("required") and name not in given]
    if missing and focused is None:
        raise LookupError(f"/{command['name']} needs {', '.join(missing)}")
    if any(option["type"] in (1, 2) for option in known.values()):
        raise LookupError(f"/{command['name']} needs a subcommand: {', '.join(known)}")
    filled = []
    for name, value in given.items():
        if name not in known:
            raise LookupError(f"/{command['name']} has no option {name!r}: it has {', '.join(known) or 'none'}")
        kind = known[name]["type"]
        if name == focused:
            filled.append({"name": name, "type": kind, "value": value, "focused": True})
        else:
            filled.append({"name": name, "type": kind, "value": _value(simulator, kind, value, guild_id, resolved)})
    return filled


def _value(simulator: Simulator, kind: int, value: Any, guild_id: int | None, resolved: Json) -> Any:
    world = simulator.world
    if kind not in (_USER, _CHANNEL, _ROLE, _MENTIONABLE):
        return value
    if kind == _CHANNEL and guild_id is not None:
        resolved.setdefault("channels", {})[str(value)] = _channel(simulator, guild_id, int(value))
    elif guild_id is not None and kind in (_ROLE, _MENTIONABLE) and int(value) in world.guild(guild_id).roles:
        resolved.setdefault("roles", {})[str(value)] = role_payload(world.guild(guild_id).roles[int(value)])
    else:
        resolved.setdefault("users", {})[str(value)] = user_payload(world.user(int(value)))
        member = None if guild_id is None else world.guild(guild_id).members.get(int(value))
        if member is not None:
            permissions = 0 if guild_id is None else world.guild(guild_id).permissions_of(int(value))
            partial = member_payload(member) | {"permissions": str(permissions)}
            del partial["user"]
            resolved.setdefault("members", {})[str(value)] = partial
    return str(value)
