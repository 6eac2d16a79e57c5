"""What people do in a test, and what the bot answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulator.interactions import InteractionResult
    from testing.running import RunningBot

#: Seconds for an answer. Discord gives a first one 3, but a bot that deferred may take longer.
ANSWER_SECONDS = 15.0
#: Seconds between two looks at what the bot has sent.
_INTERVAL = 0.005
#: A component's response that changes nothing at once.
_DEFERRED_UPDATE = 6


@dataclass(frozen=True)
class Person:
    """A member of the test's guild, or somebody in direct messages with the bot."""

    id: int
    name: str
    #: None in direct messages.
    guild_id: int | None
    _bot: RunningBot = field(repr=False, compare=False)

    @property
    def mention(self) -> str:
        """How a message mentions them."""
        return f"<@{self.id}>"

    @property
    def display_name(self) -> str:
        """What Discord shows: the nickname in this guild, otherwise the global name, otherwise `name`."""
        world = self._bot.world
        member = None if self.guild_id is None else world.guild(self.guild_id).members.get(self.id)
        return (member and member.nick) or world.user(self.id).global_name or self.name

    def in_direct_messages(self) -> Person:
        """Return the same person in direct messages with the bot."""
        return Person(self.id, self.name, None, self._bot)

    async def slash(self, command: str, /, *, locale: str = "en-US", **options: Any) -> Reply:
        """Use a slash command and return the answer.

        `command`: with its subcommand, such as "cogs list". `options`: people, channels and roles may be given as such
        or by id. `locale`: the language of this person's client. Raises `LookupError` if it is not registered here.
        """
        name, group, subcommand = _path(command)
        self._bot.simulator.interactions.locales[self.id] = locale
        result = await self._bot.simulator.run_command(
            name, user_id=self.id, guild_id=self.guild_id, subcommand_group=group, subcommand=subcommand,
            options={key: _id_of(value) for key, value in options.items()},
        )  # fmt: skip
        return await Reply(result, self).answered()

    async def complete(self, command: str, option: str, typed: str = "", /, **options: Any) -> list[str]:
        """Type into an option of a slash command, and return the names of the choices that the bot offers."""
        name, group, subcommand = _path(command)
        given = {key: _id_of(value) for key, value in options.items()} | {option: typed}
        result = await self._bot.simulator.autocomplete(
            name, user_id=self.id, guild_id=self.guild_id, focused=option, subcommand_group=group,
            subcommand=subcommand, options=given,
        )  # fmt: skip
        reply = await Reply(result, self).answered()
        return [str(choice["name"]) for choice in reply.result.choices or []]

    async def menu(self, name: str, target: Person | Message, /) -> Reply:
        """Use a context menu on a person or on a message, and return the answer."""
        message = None
        if isinstance(target, Message):
            message = {"author_id": target.author_id, "content": target.content}
        result = await self._bot.simulator.use_menu(
            name, user_id=self.id, target_id=target.id, guild_id=self.guild_id, message=message
        )
        return await Reply(result, self).answered()

    async def say(self, content: str, channel_id: int | None = None) -> Message:
        """Send a message in a channel of the guild, by default its first text channel, or in direct messages.

        Cogs see the content if one of them declares the intent for it.
        """
        before = self._bot.sent_ids()
        if self.guild_id is None:
            channel_id = int(self._bot.simulator.channels.direct_channel(self.id)["id"])
            message_id = self._bot.world.direct_message(self.id, content)
        else:
            channel_id = channel_id or self._bot.channel_id
            message_id = self._bot.world.message(self.guild_id, channel_id, self.id, content)
        return Message(message_id, channel_id, self.id, content, self._bot, before)

    async def react(self, message: Message, emoji: str = "👍") -> None:
        """Add a reaction to a message."""
        author = str(message.author_id)
        self._bot.world.react(self.guild_id, message.channel_id, message.id, self.id, emoji, message_author_id=author)

    async def unreact(self, message: Message, emoji: str = "👍") -> None:
        """Remove a reaction from a message."""
        self._bot.world.unreact(self.guild_id, message.channel_id, message.id, self.id, emoji)

    async def join_voice(self, channel_id: int | None = None) -> None:
        """Join a voice channel, by default the guild's first, or move there."""
        assert self.guild_id is not None, "voice channels are in the guild"
        self._bot.world.set_voice(self.guild_id, self.id, channel_id or self._bot.voice_channel_id)

    async def leave_voice(self) -> None:
        """Leave the voice channel."""
        assert self.guild_id is not None, "voice channels are in the guild"
        self._bot.world.set_voice(self.guild_id, self.id, None)

    async def leave(self) -> None:
        """Leave the guild."""
        assert self.guild_id is not None, "people leave the guild"
        self._bot.world.leave(self.guild_id, self.id)


@dataclass(frozen=True)
class Message:
    """A message of a person."""

    id: int
    channel_id: int
    author_id: int
    content: str
    _bot: RunningBot = field(repr=False, compare=False)
    _before: frozenset[int] = field(repr=False, compare=False)

    async def answer(self, timeout: float = ANSWER_SECONDS) -> str:
        """Return the text of the bot's first message in this channel since. Raises `AssertionError` if none comes."""
        found: list[str] = []

        def look() -> bool:
            found[:] = self._bot.texts_since(self._before, self.channel_id)
            return bool(found)

        await wait_for(look, timeout, f"the bot sent nothing in answer to {self.content!r}")
        return found[0]


class Reply:
    """The bot's answer to one thing that a person did. It is equal to its text, and `in` looks into that."""

    __hash__ = None  # type: ignore[assignment]  # its text may change

    def __init__(self, result: InteractionResult, person: Person) -> None:
        #: Everything that the simulator recorded: edits with their times, files, embeds, components.
        self.result: InteractionResult = result
        self.person: Person = person

    def __repr__(self) -> str:
        shown = [repr(self.text)]
        shown += ["ephemeral"] if self.is_ephemeral else []
        shown += [f"form {self.form!r}"] if self.form is not None else []
        shown += [f"buttons {', '.join(self.buttons)}"] if self.buttons else []
        shown += [f"then {text!r}" for text in self.followups]
        return f"<Reply {'; '.join(shown)}>"

    def __eq__(self, other: object) -> bool:
        return self.text == (other.text if isinstance(other, Reply) else other)

    def __contains__(self, part: str) -> bool:
        return part in self.text

    @property
    def text(self) -> str:
        """The text as it is now. For a component that changed its message, that message's."""
        shown = self.result
        if shown.source is not None and shown.message is shown.source.message:
            shown = shown.source
        if shown.final_content is None and self.followups:  # a deferral that was followed by something else
            return self.followups[0]
        return shown.final_content or ""

    @property
    def is_ephemeral(self) -> bool:
        """Whether nobody else sees it."""
        return self.result.ephemeral

    @property
    def embeds(self) -> list[dict[str, Any]]:
        """Its embeds as they are now."""
        return list((self.result.message or {}).get("embeds") or [])

    @property
    def followups(self) -> list[str]:
        """The texts of further messages."""
        return [str(message["content"]) for message in self.result.followups]

    @property
    def buttons(self) -> list[str]:
        """The labels of the buttons that can be pressed."""
        return list(self.result.buttons)

    @property
    def form(self) -> str | None:
        """The title of the form that the bot opened; None if it opened none."""
        return None if self.result.modal is None else str(self.result.modal.get("title"))

    async def press(self, label: str, *, by: Person | None = None) -> Reply:
        """Press a button by its label, as the same person or somebody else, and return the answer."""
        person = by or self.person
        buttons = self.result.buttons
        if label not in buttons:
            raise AssertionError(f"no button {label!r} in {self!r}")
        result = await person._bot.simulator.press(self.result, buttons[label], user_id=person.id)
        return await Reply(result, person).answered()

    async def choose(self, *values: Any, menu: str | None = None, by: Person | None = None) -> Reply:
        """Select values in a menu and return the answer. `menu`: its custom id, if there are several."""
        person = by or self.person
        menus = [
            component["custom_id"]
            for row in (self.result.message or {}).get("components") or []
            for component in row.get("components", [])
            if component.get("type") in (3, 5, 6, 7, 8)
        ]
        if not menus or (menu is not None and menu not in menus):
            raise AssertionError(f"no menu {'' if menu is None else menu!r} in {self!r}")
        chosen = [str(_id_of(value)) for value in values]
        result = await person._bot.simulator.select(self.result, menu or menus[0], chosen, user_id=person.id)
        return await Reply(result, person).answered()

    async def fill(self, fields: dict[str, str] | None = None, /, *, by: Person | None = None, **texts: str) -> Reply:
        """Submit the form that the bot opened, with texts by label or custom id, and return the answer."""
        person = by or self.person
        result = await person._bot.simulator.submit(self.result, {**(fields or {}), **texts}, user_id=person.id)
        return await Reply(result, person).answered()

    async def becomes(self, text: str | Callable[[str], bool], timeout: float = ANSWER_SECONDS) -> Reply:
        """Wait until the text is as given, or until a function of it is true. Raises `AssertionError` if it is not."""
        condition = text if callable(text) else lambda now: now == text
        await wait_for(lambda: condition(self.text), timeout, lambda: f"still {self!r}")
        return self

    async def answered(self, timeout: float = ANSWER_SECONDS) -> Reply:
        """Wait for an answer that is no deferral. Raises `AssertionError` if none comes."""

        def is_answered() -> bool:
            result = self.result
            return result.done or result.modal is not None or result.type == _DEFERRED_UPDATE

        await wait_for(is_answered, timeout, lambda: f"no answer to {self.person.name} within {timeout:g} s: {self!r}")
        return self


async def wait_for(condition: Callable[[], bool], timeout: float, otherwise: str | Callable[[], str]) -> None:
    """Wait until a condition holds. Raises `AssertionError` with the message `otherwise` if it does not in time."""
    try:
        async with asyncio.timeout(timeout):
            while not condition():  # noqa: ASYNC110 - of other tasks, which do not tell
                await asyncio.sleep(_INTERVAL)
    except TimeoutError:
        raise AssertionError(otherwise() if callable(otherwise) else otherwise) from None


def _path(command: str) -> tuple[str, str | None, str | None]:
    """Return the name, the subcommand group and the subcommand that a command as it is typed has."""
    name, *rest = command.removeprefix("/").split()
    return name, rest[0] if len(rest) > 1 else None, rest[-1] if rest else None


def _id_of(value: Any) -> Any:
    return value.id if isinstance(value, Person | Message) else value
