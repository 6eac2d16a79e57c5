"""Which sessions receive what: intents, the message content intent, and direct messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from simulator import Simulator, World
from simulator.messages import direct_channel_id
from simulator.state import Intent
from tests.simulator.clients import ALL_INTENTS, BareClient, bare_client

pytestmark = pytest.mark.guilds(10)

Act = Callable[[World, int, int, int], Any]
#: By intent, what needs it: of a guild, one of its text channels and a member.
NEEDS: dict[Intent, dict[str, Act]] = {
    Intent.GUILD_MESSAGES: {
        "MESSAGE_CREATE": lambda world, guild, channel, user: world.message(guild, channel, user, "hello"),
        "MESSAGE_UPDATE": lambda world, guild, channel, user: world.edit_message(guild, channel, 5, user, "hello"),
        "MESSAGE_DELETE": lambda world, guild, channel, user: world.delete_message(guild, channel, 5),
        "MESSAGE_DELETE_BULK": lambda world, guild, channel, user: world.delete_messages(guild, channel, [5]),
    },
    Intent.GUILD_MESSAGE_REACTIONS: {
        "MESSAGE_REACTION_ADD": lambda world, guild, channel, user: world.react(guild, channel, 5, user),
        "MESSAGE_REACTION_REMOVE": lambda world, guild, channel, user: world.unreact(guild, channel, 5, user),
        "MESSAGE_REACTION_REMOVE_ALL": lambda world, guild, channel, user: world.clear_reactions(guild, channel, 5),
        "MESSAGE_REACTION_REMOVE_EMOJI": lambda world, guild, channel, user: world.clear_reactions(
            guild, channel, 5, "👍"
        ),
    },
    Intent.GUILD_MESSAGE_TYPING: {
        "TYPING_START": lambda world, guild, channel, user: world.start_typing(guild, channel, user)
    },
    Intent.GUILD_MESSAGE_POLLS: {
        "MESSAGE_POLL_VOTE_ADD": lambda world, guild, channel, user: world.vote(guild, channel, 5, user),
        "MESSAGE_POLL_VOTE_REMOVE": lambda world, guild, channel, user: world.vote(
            guild, channel, 5, user, is_removed=True
        ),
    },
    Intent.DIRECT_MESSAGES: {
        "MESSAGE_CREATE": lambda world, guild, channel, user: world.direct_message(user, "psst"),
        "MESSAGE_DELETE": lambda world, guild, channel, user: world.delete_message(None, direct_channel_id(user), 5),
        "CHANNEL_PINS_UPDATE": lambda world, guild, channel, user: world.pin(None, direct_channel_id(user)),
    },
    Intent.DIRECT_MESSAGE_REACTIONS: {
        "MESSAGE_REACTION_ADD": lambda world, guild, channel, user: world.react(None, direct_channel_id(user), 5, user)
    },
    Intent.DIRECT_MESSAGE_TYPING: {
        "TYPING_START": lambda world, guild, channel, user: world.start_typing(None, direct_channel_id(user), user)
    },
    Intent.DIRECT_MESSAGE_POLLS: {
        "MESSAGE_POLL_VOTE_ADD": lambda world, guild, channel, user: world.vote(None, direct_channel_id(user), 5, user)
    },
    Intent.GUILD_PRESENCES: {"PRESENCE_UPDATE": lambda world, guild, channel, user: world.set_presence(user, "idle")},
    Intent.GUILD_VOICE_STATES: {
        "VOICE_STATE_UPDATE": lambda world, guild, channel, user: world.set_voice(guild, user, channel)
    },
    Intent.GUILD_INVITES: {"INVITE_CREATE": lambda world, guild, channel, user: world.create_invite(guild, channel)},
    Intent.GUILD_EXPRESSIONS: {
        "GUILD_EMOJIS_UPDATE": lambda world, guild, channel, user: world.set_emojis(guild, "wave"),
        "GUILD_SOUNDBOARD_SOUND_CREATE": lambda world, guild, channel, user: world.change_sound(guild, "CREATE"),
    },
    Intent.GUILD_SCHEDULED_EVENTS: {
        "GUILD_SCHEDULED_EVENT_CREATE": lambda world, guild, channel, user: world.change_event(guild, "CREATE")
    },
    Intent.GUILD_WEBHOOKS: {
        "WEBHOOKS_UPDATE": lambda world, guild, channel, user: world.change_webhooks(guild, channel)
    },
    Intent.GUILD_INTEGRATIONS: {
        "INTEGRATION_CREATE": lambda world, guild, channel, user: world.change_integration(guild, "CREATE")
    },
    Intent.AUTO_MODERATION_CONFIGURATION: {
        "AUTO_MODERATION_RULE_CREATE": lambda world, guild, channel, user: world.change_rule(guild, "CREATE")
    },
    Intent.AUTO_MODERATION_EXECUTION: {
        "AUTO_MODERATION_ACTION_EXECUTION": lambda world, guild, channel, user: world.execute_rule(
            guild, channel, user, 5
        )
    },
    Intent.GUILD_MODERATION: {
        "GUILD_AUDIT_LOG_ENTRY_CREATE": lambda world, guild, channel, user: world.log_audit(guild, user, 24)
    },
}


async def received(client: BareClient, world: World, guild_id: int) -> list[dict[str, Any]]:
    """Return the dispatches that a client got before a marker that is sent now, READY and GUILD_CREATE aside."""
    world.create_role(guild_id)
    await client.wait_for("GUILD_ROLE_CREATE")
    return [message for message in client.seen if message.get("t") not in (None, "READY", "GUILD_CREATE")][:-1]


@pytest.mark.parametrize("intent", NEEDS, ids=lambda intent: intent.name)
async def test_an_event_needs_its_intent(simulator: Simulator, world: World, intent: Intent) -> None:
    (guild_id,) = world.guilds
    user = world.guild(guild_id).owner_id
    channel = world.create_channel(guild_id, "talk")
    without = ALL_INTENTS & ~intent
    async with (
        bare_client(simulator, intents=int(Intent.GUILDS | intent)) as with_it,
        bare_client(simulator, intents=without) as without_it,
    ):
        for act in NEEDS[intent].values():
            act(world, guild_id, channel, user)
        names = {message["t"] for message in await received(with_it, world, guild_id)}
        assert NEEDS[intent].keys() <= names
        assert not NEEDS[intent].keys() & {message["t"] for message in await received(without_it, world, guild_id)}


async def test_content_is_left_out_but_for_mentions_direct_messages_and_the_bots_own(
    simulator: Simulator, world: World
) -> None:
    (guild_id,) = world.guilds
    user = world.guild(guild_id).owner_id
    channel = world.create_channel(guild_id, "talk")
    file = [{"id": "5", "filename": "cat.png", "size": 1, "url": "https://example.com/cat.png"}]
    async with bare_client(simulator, intents=ALL_INTENTS & ~Intent.MESSAGE_CONTENT) as client:
        world.message(guild_id, channel, user, "plain", attachments=file, poll={"question": {"text": "?"}})
        world.message(guild_id, channel, user, f"hey <@{world.bot.id}>", attachments=file)
        world.message(guild_id, channel, world.bot.id, "mine")
        world.direct_message(user, "psst")
        world.edit_message(guild_id, channel, 5, user, "plain")
        messages = [message["d"] for message in await received(client, world, guild_id)]
        contents = ["", f"hey <@{world.bot.id}>", "mine", "psst", ""]
        assert [message["content"] for message in messages] == contents
        assert [len(message["attachments"]) for message in messages] == [0, 1, 0, 0, 0]
        assert "poll" not in messages[0]
        assert [mention["id"] for mention in messages[1]["mentions"]] == [str(world.bot.id)]


async def test_direct_messages_go_to_the_first_shard(simulator: Simulator, world: World) -> None:
    user = world.guild(next(iter(world.guilds))).owner_id
    async with bare_client(simulator, shard=[0, 2]) as first, bare_client(simulator, shard=[1, 2]) as second:
        world.direct_message(user, "psst")
        world.update_own_user(username="renamed")
        await first.wait_for("USER_UPDATE")
        await second.wait_for("USER_UPDATE")
        assert "MESSAGE_CREATE" in {message.get("t") for message in first.seen}
        assert "MESSAGE_CREATE" not in {message.get("t") for message in second.seen}
