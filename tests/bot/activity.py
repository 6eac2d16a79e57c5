"""Everything that can happen in a guild and in direct messages, once: what listeners are tested with."""

from __future__ import annotations

import asyncio
from typing import Any

import discord

from simulator import Simulator
from simulator.messages import direct_channel_id
from tests.waiting import TIMEOUT
from utils.bot.client import Guildbook

POLL: dict[str, Any] = {
    "question": {"text": "Which?"}, "answers": [{"answer_id": 1, "poll_media": {"text": "This"}}],
    "expiry": "2031-01-01T00:00:00+00:00", "allow_multiselect": False, "layout_type": 1,
    "results": {"is_finalized": False, "answer_counts": []},
}  # fmt: skip


async def let_everything_happen(bot: Guildbook, simulator: Simulator, guild_id: int) -> int:
    """Let a new member do everything, and wait until the bot has received it. Returns the member's id."""
    world = simulator.world
    guild = world.guild(guild_id)
    channel = world.create_channel(guild_id, "talk")
    voice = world.create_channel(guild_id, "voice", 2)
    user = world.join(guild_id)
    world.update_member(guild_id, user, nick="Nick")
    world.rename_user(user, global_name="Somebody else")

    messages = [world.message(guild_id, channel, user, "hello", poll=POLL) for _ in range(4)]
    world.edit_message(guild_id, channel, messages[0], user, "hello again", poll=POLL)
    world.vote(guild_id, channel, messages[0], user)
    world.vote(guild_id, channel, messages[0], user, is_removed=True)
    for emoji in ("👍", "👎"):
        world.react(guild_id, channel, messages[0], user, emoji)
    world.unreact(guild_id, channel, messages[0], user, "👍")
    world.clear_reactions(guild_id, channel, messages[0], "👎")
    world.clear_reactions(guild_id, channel, messages[0])
    world.delete_message(guild_id, channel, messages[0])
    world.delete_messages(guild_id, channel, messages[1:])
    world.start_typing(guild_id, channel, user)

    await bot.create_dm(discord.Object(user))  # discord.py reports pins of direct messages that it opened itself
    direct = direct_channel_id(user)
    message = world.direct_message(user, "psst")
    world.edit_message(None, direct, message, user, "pssst")
    world.react(None, direct, message, user)
    world.start_typing(None, direct, user)
    world.pin(None, direct)
    world.delete_message(None, direct, message)

    world.set_presence(user, "idle")
    world.set_voice(guild_id, user, voice)
    world.send_voice_effect(guild_id, voice, user)
    thread = world.create_thread(guild_id, channel, joined=True)
    world.change_thread_members(guild_id, thread, added=[user])
    world.change_thread_members(guild_id, thread, removed=[user])
    world.create_invite(guild_id, channel)
    world.delete_invite(guild_id, channel)
    world.set_emojis(guild_id, "wave")
    world.set_stickers(guild_id, "cat")
    sound = world.change_sound(guild_id, "CREATE")
    world.change_sound(guild_id, "UPDATE", sound, name="bell")
    world.change_sound(guild_id, "DELETE", sound)
    event = world.change_event(guild_id, "CREATE")
    world.subscribe(guild_id, event, user)
    world.subscribe(guild_id, event, user, is_removed=True)
    world.change_event(guild_id, "UPDATE", event, name="Later")
    world.change_event(guild_id, "DELETE", event)
    rule = world.change_rule(guild_id, "CREATE")
    world.change_rule(guild_id, "UPDATE", rule, enabled=False)
    world.execute_rule(guild_id, channel, user, rule)
    world.change_rule(guild_id, "DELETE", rule)
    world.change_webhooks(guild_id, channel)
    integration = world.change_integration(guild_id, "CREATE")
    world.change_integration(guild_id, "UPDATE", integration)
    world.change_integration(guild_id, "DELETE", integration)
    world.log_audit(guild_id, guild.owner_id, 24, user)
    world.ban(guild_id, user)
    world.unban(guild_id, user)
    await until_received(bot, simulator, guild_id)
    return user


async def until_received(bot: Guildbook, simulator: Simulator, guild_id: int) -> None:
    """Wait until discord.py has parsed everything that was sent so far, and its listeners have run."""
    marker = asyncio.ensure_future(bot.wait_for("guild_role_create", check=lambda role: role.name == "marker"))
    simulator.world.create_role(guild_id, "marker")
    async with asyncio.timeout(TIMEOUT):
        await marker
