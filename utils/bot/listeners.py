"""What discord.py needs to dispatch each event, and which listeners of a cog can therefore never be called.

One table, read from discord.py 2.7.1 (`state.py`): tests/bot/test_listeners.py compares it with that source.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

import discord

#: A cache of discord.py, which is set up by MEMBER_CACHE or MESSAGE_CACHE.
Cache = Literal["members", "messages"]


@dataclass(frozen=True, slots=True)
class Event:
    """What discord.py needs before it dispatches an event."""

    #: Any of these is enough; empty if no intent is needed.
    intents: tuple[str, ...] = ()
    #: All of these are needed.
    caches: tuple[Cache, ...] = ()
    #: The event that needs no cache; None if there is none.
    instead: str | None = None
    #: Why it is never dispatched to this bot, whatever the intents; None for all others.
    never: str | None = None


_MESSAGES = ("guild_messages", "dm_messages")
_REACTIONS = ("guild_reactions", "dm_reactions")
_POLLS = ("guild_polls", "dm_polls")
_TYPING = ("guild_typing", "dm_typing")

#: Every event of discord.py that needs more than the intent `guilds`, by its name without `on_`.
EVENTS: dict[str, Event] = {
    "message": Event(_MESSAGES),
    "message_edit": Event(_MESSAGES, ("messages",), "raw_message_edit"),
    "message_delete": Event(_MESSAGES, ("messages",), "raw_message_delete"),
    "bulk_message_delete": Event(_MESSAGES, ("messages",), "raw_bulk_message_delete"),
    "raw_message_edit": Event(_MESSAGES),
    "raw_message_delete": Event(_MESSAGES),
    "raw_bulk_message_delete": Event(_MESSAGES),
    "reaction_add": Event(_REACTIONS, ("messages",), "raw_reaction_add"),
    "reaction_remove": Event(_REACTIONS, ("messages", "members"), "raw_reaction_remove"),
    "reaction_clear": Event(_REACTIONS, ("messages",), "raw_reaction_clear"),
    "reaction_clear_emoji": Event(_REACTIONS, ("messages",), "raw_reaction_clear_emoji"),
    "raw_reaction_add": Event(_REACTIONS),
    "raw_reaction_remove": Event(_REACTIONS),
    "raw_reaction_clear": Event(_REACTIONS),
    "raw_reaction_clear_emoji": Event(_REACTIONS),
    "poll_vote_add": Event(_POLLS, ("messages", "members"), "raw_poll_vote_add"),
    "poll_vote_remove": Event(_POLLS, ("messages", "members"), "raw_poll_vote_remove"),
    "raw_poll_vote_add": Event(_POLLS),
    "raw_poll_vote_remove": Event(_POLLS),
    "typing": Event(_TYPING),
    "raw_typing": Event(_TYPING),
    "member_join": Event(("members",)),
    "member_update": Event(("members",), ("members",), "mirror_change"),
    "member_remove": Event(("members",), ("members",), "raw_member_remove"),
    "raw_member_remove": Event(("members",)),
    "user_update": Event(("members",), ("members",), "mirror_change"),
    "thread_member_join": Event(("members",)),
    "thread_member_remove": Event(("members",)),
    "raw_thread_member_remove": Event(("members",)),
    "presence_update": Event(("presences",), ("members",), "raw_presence_update"),
    "raw_presence_update": Event(("presences",)),
    "member_ban": Event(("moderation",)),
    "member_unban": Event(("moderation",)),
    "audit_log_entry_create": Event(("moderation",)),
    "voice_state_update": Event(("voice_states",)),
    "voice_channel_effect": Event(("voice_states",)),
    "invite_create": Event(("invites",)),
    "invite_delete": Event(("invites",)),
    "webhooks_update": Event(("webhooks",)),
    "guild_integrations_update": Event(("integrations",)),
    "integration_create": Event(("integrations",)),
    "integration_update": Event(("integrations",)),
    "raw_integration_delete": Event(("integrations",)),
    "guild_emojis_update": Event(("expressions",)),
    "guild_stickers_update": Event(("expressions",)),
    "soundboard_sound_create": Event(("expressions",)),
    "soundboard_sound_update": Event(("expressions",)),
    "soundboard_sound_delete": Event(("expressions",)),
    "scheduled_event_create": Event(("guild_scheduled_events",)),
    "scheduled_event_update": Event(("guild_scheduled_events",)),
    "scheduled_event_delete": Event(("guild_scheduled_events",)),
    "scheduled_event_user_add": Event(("guild_scheduled_events",), ("members",)),
    "scheduled_event_user_remove": Event(("guild_scheduled_events",), ("members",)),
    "automod_rule_create": Event(("auto_moderation_configuration",)),
    "automod_rule_update": Event(("auto_moderation_configuration",)),
    "automod_rule_delete": Event(("auto_moderation_configuration",)),
    "automod_action": Event(("auto_moderation_execution",)),
    "private_channel_pins_update": Event(("dm_messages",)),
    "private_channel_update": Event(never="Discord sends it to no bot"),
    "socket_raw_receive": Event(never="discord.py dispatches it in debug mode only", instead="socket_event_type"),
    "socket_raw_send": Event(never="discord.py dispatches it in debug mode only"),
}

#: Events that discord.py dispatches whenever the bot is connected: no intent but `guilds`, no cache.
ALWAYS: frozenset[str] = frozenset(
    (
        "app_command_completion", "command", "command_completion", "command_error", "connect", "disconnect",
        "entitlement_create", "entitlement_delete", "entitlement_update", "guild_available",
        "guild_channel_create", "guild_channel_delete", "guild_channel_pins_update", "guild_channel_update",
        "guild_join", "guild_remove", "guild_role_create", "guild_role_delete", "guild_role_update",
        "guild_unavailable", "guild_update", "interaction", "raw_app_command_permissions_update", "raw_thread_delete",
        "raw_thread_update", "ready", "resumed", "shard_connect", "shard_disconnect", "shard_ready",
        "shard_resumed", "socket_event_type", "stage_instance_create", "stage_instance_delete",
        "stage_instance_update", "subscription_create", "subscription_delete", "subscription_update", "thread_create",
        "thread_delete", "thread_join", "thread_remove", "thread_update",
    )
)  # fmt: skip

#: Events that the mirror dispatches with EVENTS_FROM_MIRROR=1, for every member.
FROM_MIRROR: frozenset[str] = frozenset(("member_update", "member_remove", "user_update"))

#: The event of the change feed.
CHANGE_EVENT = "mirror_change"
_KNOWN = sorted((*EVENTS, *ALWAYS, "error", CHANGE_EVENT))
#: How similar to an event an unknown name must be to count as misspelt.
SIMILARITY = 0.88

#: What Discord leaves empty in messages of a guild without the intent message_content, unless they mention the bot.
_CONTENT = frozenset(("attachments", "clean_content", "components", "content", "embeds", "poll", "system_content"))
#: Events that carry a message with its content.
_WITH_CONTENT = frozenset(("message", "message_edit", "raw_message_edit"))


@dataclass(frozen=True, slots=True)
class Present:
    """What a bot has for its listeners."""

    intents: discord.Intents
    #: Value of MEMBER_CACHE.
    member_cache: str
    #: Value of MESSAGE_CACHE.
    message_cache: int
    #: Events that are dispatched by other means than discord.py's.
    provided: frozenset[str] = frozenset()
    #: Events that cogs dispatch themselves.
    own: frozenset[str] = frozenset()


def find_problem(event: str, present: Present) -> str | None:
    """Return why an event cannot be dispatched and what to do, in one line; None if it can or is no event of Discord's.

    `event` is its name without `on_`.
    """
    if event in present.provided or event in present.own:
        return None
    needs = EVENTS.get(event)
    if needs is None:
        return _find_mistake(event)
    if needs.never is not None:
        return f"is never called: {needs.never}{_advice(needs.instead, [])}"
    missing, settings = [], []
    if "messages" in needs.caches and not present.message_cache:
        missing.append("messages in memory")
        settings.append("MESSAGE_CACHE=1000")
    if "members" in needs.caches and present.member_cache != "all":
        missing.append("members in memory" if present.member_cache == "none" else "all members in memory")
        settings.append("MEMBER_CACHE=all")
    if event in FROM_MIRROR:
        settings = ["EVENTS_FROM_MIRROR=1 or MEMBER_CACHE=all"]
    advice = _advice(needs.instead, settings)
    if needs.intents and not any(getattr(present.intents, name) for name in needs.intents):
        missing.insert(0, f"the intent {' or '.join(needs.intents)}")
        advice = f"; {how_to_declare(needs.intents[0])}{advice if settings else ''}"
    elif missing and needs.caches == ("members",):
        who = "the bot itself" if present.member_cache == "none" else "members in voice channels"
        return f"is called for {who} only (MEMBER_CACHE={present.member_cache}){advice}"
    return f"is never called without {' and '.join(missing)}{advice}" if missing else None


def is_event(event: str) -> bool:
    """Return whether discord.py dispatches an event of this name."""
    return event in EVENTS or event in ALWAYS


def _find_mistake(event: str) -> str | None:
    """Return that an event is probably misspelt; None if it is one of discord.py's, of ours, or unlike all of them."""
    if event in _KNOWN:
        return None
    similar = difflib.get_close_matches(event, _KNOWN, 1, SIMILARITY)
    return f"is never called: there is no such event; did you mean on_{similar[0]}?" if similar else None


def how_to_declare(intent: str) -> str:
    """Return how a bot gets an intent, as a part of a sentence."""
    return f"declare intents = discord.Intents({intent}=True) in the cog, or set INTENTS={intent}"


def find_content_problem(event: str, reads: frozenset[str], present: Present) -> str | None:
    """Return that a listener reads what Discord leaves empty, in one line; None if it does not.

    `reads` are the attributes that it reads.
    """
    read = sorted(_CONTENT & reads)
    if event not in _WITH_CONTENT or present.intents.message_content or not read:
        return None
    what = f"message.{read[0]}" if event == "message" else read[0]
    return f"reads {what}, which is empty in guilds unless the bot is mentioned; {how_to_declare('message_content')}"


def names_read(function: Callable[..., Any]) -> frozenset[str]:
    """Return the attributes that a function and the functions in it read."""
    return frozenset(_names(getattr(function, "__code__", None)))


def _names(code: CodeType | None) -> Iterator[str]:
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _names(constant)


def _advice(instead: str | None, settings: list[str]) -> str:
    """Return what to use or to set, with the separator before it; empty if there is nothing."""
    choices = ([f"use on_{instead}"] if instead is not None else []) + (
        [f"set {' and '.join(settings)}"] if settings else []
    )
    return f"; {', or '.join(choices)}" if choices else ""
