"""Nobody is left without an answer: whatever raises, hangs, is slow or ends without one, in every kind of handler."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from simulator import InteractionResult, Simulator
from tests.bot.cogs import answering
from tests.bot.running import running_bot
from tests.waiting import until
from utils.bot import command_errors, invocations
from utils.bot.client import Guildbook
from utils.database import Pool

pytestmark = pytest.mark.guilds(10)

#: Seconds in these tests: until a deferral, and until a command is given up.
DEFER_AFTER, BOUND = 0.3, 1.0
TIMED_OUT = command_errors.timed_out(BOUND)
FAILED = command_errors.INTERNAL_ERROR.removesuffix(".")


def hurry(bot: Guildbook) -> None:
    """Shorten the times."""
    bot.invocations.defer_after, bot.invocations.bound = DEFER_AFTER, BOUND


@pytest.fixture
async def bot(database: Pool, simulator: Simulator) -> AsyncIterator[Guildbook]:
    """A bot with the cog, which answers within a second."""
    simulator.interactions.response_deadline = 0.55
    async with running_bot(database, simulator, extensions=[answering.__name__], configure=hurry) as bot:
        yield bot


class User:
    """A member who uses the bot."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        guild = next(iter(simulator.world.guilds.values()))
        self.where: dict[str, Any] = {"user_id": guild.owner_id, "guild_id": guild.id}
        self.id = guild.owner_id
        self.guild = guild

    async def run(self, name: str, **options: Any) -> InteractionResult:
        return await self.simulator.run_command(name, options=options, **self.where)

    async def quote(self, how: str) -> InteractionResult:
        message = {"author_id": self.id, "content": how}
        return await self.simulator.use_menu("Quote", target_id=5, message=message, **self.where)

    async def press(self, how: str, kind: str = "") -> InteractionResult:
        shop = await (await self.run("shop", does=how, kind=kind)).wait_done()
        custom_id = f"ticket:{how}" if kind == "ticket" else "pay"
        return await self.simulator.press(shop, custom_id, user_id=self.id)

    async def submit(self, how: str) -> InteractionResult:
        form = await (await self.run("form")).wait_done()
        return await self.simulator.submit(form, {"How": how}, user_id=self.id)

    def ways(self) -> dict[str, Callable[[str], Awaitable[InteractionResult]]]:
        """Return how to reach each kind of handler, to do something by its name."""
        return {
            "a plain cog's command": lambda how: self.run("plain", how=how),
            "a hybrid command": lambda how: self.run("both", how=how),
            "a context menu": self.quote,
            "a button": self.press,
            "a dynamic button": lambda how: self.press(how, "ticket"),
            "a form": self.submit,
        }


@pytest.fixture
def user(simulator: Simulator) -> User:
    """The owner of the guild."""
    return User(simulator)


async def answer_of(result: InteractionResult) -> str:
    """Return the last text that the user was shown."""
    await result.wait_done(until=lambda result: bool(result.texts))
    return result.texts[-1]


async def test_every_handler_that_raises_is_answered_and_named(
    bot: Guildbook, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["/plain", "/both", "menu 'Quote'", "button 'Pay' of Shop", "Ticket 'ticket:raise'"]
    names.append("form 'Feedback' of Form")
    for (way, use), name in zip(user.ways().items(), names, strict=True):
        caplog.clear()
        result = await use("raise")
        text = await answer_of(result)
        assert text.startswith(FAILED), way
        reference = text.partition("(ref ")[2][:8]
        (line,) = [line for line in caplog.records if getattr(line, "reference", None) == reference]
        assert f"{name} by user {user.id}" in line.getMessage()
        assert (line.name, line.exc_info is not None) == (answering.__name__, True)
        assert await answer_of(await use("decline")) == "You have nothing:\nbuy something", way
        text = await answer_of(await use("invalid"))
        assert text.startswith("Invalid input: amount should be greater than 0"), way


async def test_a_select_and_the_view_of_an_earlier_process_are_answered(
    bot: Guildbook, user: User, simulator: Simulator
) -> None:
    shop = await (await user.run("shop", does="raise")).wait_done()
    chosen = await simulator.select(shop, "choose", ["raise"], user_id=user.id)
    assert (await answer_of(chosen)).startswith(FAILED)
    assert shop.message is not None
    shop.message["id"] = "5"  # of another view with the same custom ids
    assert (await answer_of(await simulator.press(shop, "pay", user_id=user.id))).startswith(FAILED)
    forgotten = await simulator.press(shop, "unknown", user_id=user.id)
    assert await answer_of(forgotten) == invocations.INACTIVE
    inspected = await simulator.use_menu("Inspect", target_id=user.id, **user.where)
    assert (await answer_of(inspected)).startswith(FAILED)


async def test_an_on_error_of_the_author_is_left_alone(
    bot: Guildbook, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    assert await answer_of(await user.press("raise", "own")) == "handled here"
    assert not [line for line in caplog.records if line.levelno >= logging.WARNING]


async def test_errors_that_escape_discord_py_are_answered(bot: Guildbook, user: User) -> None:
    for name in ("unchecked", "rethrown"):
        assert (await answer_of(await user.run(name))).startswith(FAILED), name
    for use in user.ways().values():
        assert (await answer_of(await use("cancel"))).startswith(FAILED)


async def test_a_slow_answer_replaces_the_deferral(bot: Guildbook, user: User) -> None:
    for way, use in user.ways().items():
        result = await use("slow")
        if way == "a hybrid command":
            continue
        assert await answer_of(result) == "slow answer", way
        assert result.deferred, way


async def test_a_late_answer_is_as_private_as_it_was_written(bot: Guildbook, user: User) -> None:
    private = await user.run("private")
    assert await answer_of(private) == "a secret"
    assert private.ephemeral, "deferred privately, because the code says so"
    published = await user.run("published")
    assert await answer_of(published) == "for all"
    assert published.message is None, "the private deferral is deleted"
    helped = await user.run("helped")
    assert await answer_of(helped) == "a secret"
    assert helped.followups[0]["flags"] & 64
    assert helped.message is None, "the public deferral is deleted"


async def test_a_form_that_comes_too_late_says_so(bot: Guildbook, user: User, caplog: pytest.LogCaptureFixture) -> None:
    result = await user.run("form", late=True)
    assert (await answer_of(result)).startswith(command_errors.TOO_LATE.removesuffix("."))
    assert "open it before anything slow" in caplog.text


async def test_whatever_hangs_is_given_up_and_the_user_is_told(
    bot: Guildbook, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    for way, use in user.ways().items():
        caplog.clear()
        result = await use("hang")
        assert (await answer_of(result)).startswith(TIMED_OUT.removesuffix(".")), way
        assert "answering.py:" in caplog.text
        assert "in misbehave" in caplog.text
    assert (await answer_of(await user.run("plain", how="group"))).startswith(TIMED_OUT.removesuffix("."))
    await until(lambda: not len(bot.invocations))


async def test_a_text_command_is_bounded_too(bot: Guildbook, user: User, simulator: Simulator) -> None:
    channel_id = next(it.id for it in user.guild.channels.values() if it.type == 0 and not it.hidden)
    for how, text in (("hang", TIMED_OUT), ("raise", FAILED), ("decline", "You have nothing:\nbuy something")):
        before = len(simulator.channels.sent)
        mention = f"<@{simulator.world.bot.id}> text {how}"
        simulator.world.message(user.guild.id, channel_id, user.id, mention)
        await until(lambda: len(simulator.channels.sent) > before)  # noqa: B023 - awaited in this turn
        sent = list(simulator.channels.sent.values())[-1]
        assert sent["content"].startswith(text.removesuffix("."))


async def test_a_command_that_has_answered_may_wait_for_its_user(bot: Guildbook, user: User) -> None:
    result = await user.run("asking")
    await result.wait_done(until=lambda result: bool(result.edits))
    assert result.texts == ["Which one?", "You did not say"]
    assert await answer_of(await user.run("patient")) == "done at last"


async def test_a_command_that_forgets_to_answer_is_answered(bot: Guildbook, user: User) -> None:
    result = await user.run("forgetful")
    assert await answer_of(result) == invocations.NO_ANSWER
    silent = await user.press("nothing")
    await silent.wait_done(until=lambda result: result.type is not None)
    assert silent.type == 6, "Discord shows no failure"


async def test_autocomplete_always_gets_an_answer(
    bot: Guildbook, user: User, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    for typed, choices in (("", ["one"]), ("raise", []), ("hang", []), ("cancel", []), ("decline", [])):
        result = await simulator.autocomplete("complete", focused="what", options={"what": typed}, **user.where)
        await result.wait_done()
        assert [choice["value"] for choice in result.choices or []] == choices, typed
    (line,) = [line for line in caplog.records if line.exc_info]
    assert "/complete by user" in line.getMessage()


async def test_users_are_told_when_the_bot_stops(database: Pool, simulator: Simulator, user: User) -> None:
    async with running_bot(database, simulator, extensions=[answering.__name__]) as bot:
        bot.invocations.stop_timeout = 0.1
        hanging = [await use("hang") for use in user.ways().values()]
        await until(lambda: "form 'Feedback' of Form" in map(str, bot.invocations))
    for result in hanging:
        assert await answer_of(result) == invocations.STOPPING


async def test_the_more_commands_run_the_earlier_they_are_deferred(bot: Guildbook, user: User) -> None:
    assert bot.invocations.time_to_defer() == DEFER_AFTER, "the least there is"
    for _ in range(20):
        await user.run("plain", how="hang")
    await until(lambda: len(bot.invocations) == 20)
    bot.invocations.defer_after = 2.5
    assert bot.invocations.time_to_defer() == pytest.approx(2.3)
