"""Generated cogs that misbehave: each is answered, named and contained, and the mirror stays equal to Discord."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from simulator import InteractionResult, Simulator
from tests.bot.running import running_bot, wait_until_mirrored
from tests.bot.temporary_cogs import TemporaryCogs
from tests.waiting import until
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.service import metrics

pytestmark = pytest.mark.guilds(30)

EXHAUSTIVE = [pytest.mark.exhaustive, pytest.mark.timeout(300)]
#: What handlers do, as the body of a coroutine function.
DEEDS = {
    "raise": "raise KeyError('broken')",
    "decline": "raise Declined('not today')",
    "exit": "raise asyncio.CancelledError",
    "hang": "await asyncio.Event().wait()",
    "block": "import time; time.sleep(0.4); raise KeyError('broken')",
    "swallow": """
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if gone.is_set():
                    raise
                gone.set()
    """,
    "leak": "leaked.append(asyncio.create_task(asyncio.Event().wait(), name='leaked')); raise KeyError('broken')",
    "write": "await bot.db.execute('INSERT INTO numbers VALUES (1)'); await asyncio.Event().wait()",
    "abort": """
        async with bot.db.transaction():
            await bot.db.execute('INSERT INTO numbers VALUES (2)')
            await asyncio.Event().wait()
    """,
    "query": "await bot.db.fetch('SELECT 1 FROM nowhere')",
    "silent": "pass",
    "child": """
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.Event().wait())
            raise KeyError('broken')
    """,
}
#: Handlers, each with what reaches it. BODY is the deed; `interaction` is what it gets.
HANDLERS = {
    "command": """
class Cog(BASE, name="NAME"):
    @app_commands.command(name="NAME")
    async def run(self, interaction: discord.Interaction) -> None:
        BODY
""",
    "check": """
async def allowed(interaction: discord.Interaction) -> bool:
    BODY
class Cog(BASE, name="NAME"):
    @app_commands.command(name="NAME")
    @app_commands.check(allowed)
    async def run(self, interaction: discord.Interaction) -> None: ...
""",
    "interaction_check": """
class Cog(BASE, name="NAME"):
    async def interaction_check(self, interaction: discord.Interaction) -> bool:
        BODY
    @app_commands.command(name="NAME")
    async def run(self, interaction: discord.Interaction) -> None: ...
""",
    "error": """
class Cog(BASE, name="NAME"):
    @app_commands.command(name="NAME")
    async def run(self, interaction: discord.Interaction) -> None:
        raise RuntimeError
    @run.error
    async def on_error(self, interaction: discord.Interaction, error: Exception) -> None:
        BODY
""",
    "group": """
class Cog(BASE, name="NAME"):
    group = app_commands.Group(name="NAME", description="A group")
    @group.command()
    async def sub(self, interaction: discord.Interaction) -> None:
        BODY
""",
    "hybrid": """
class Cog(BASE, name="NAME"):
    @commands.hybrid_command(name="NAME")
    async def run(self, ctx: commands.Context) -> None:
        BODY
""",
    "button": """
class Shop(discord.ui.View):
    @discord.ui.button(label="Pay")
    async def pay(self, interaction: discord.Interaction, button: discord.ui.Button) -> None:
        BODY
class Cog(BASE, name="NAME"):
    @app_commands.command(name="NAME")
    async def run(self, interaction: discord.Interaction) -> None:
        await interaction.response.send_message("shop", view=Shop())
""",
    "view_check": """
class Shop(discord.ui.View):
    async def interaction_check(self, interaction: discord.Interaction) -> bool:
        BODY
    @discord.ui.button(label="Pay")
    async def pay(self, interaction: discord.Interaction, button: discord.ui.Button) -> None: ...
class Cog(BASE, name="NAME"):
    @app_commands.command(name="NAME")
    async def run(self, interaction: discord.Interaction) -> None:
        await interaction.response.send_message("shop", view=Shop())
""",
    "modal": """
class Form(discord.ui.Modal, title="Form"):
    text = discord.ui.TextInput(label="Text")
    async def on_submit(self, interaction: discord.Interaction) -> None:
        BODY
class Cog(BASE, name="NAME"):
    @app_commands.command(name="NAME")
    async def run(self, interaction: discord.Interaction) -> None:
        await interaction.response.send_modal(Form())
""",
    "autocomplete": """
class Cog(BASE, name="NAME"):
    @app_commands.command(name="NAME")
    async def run(self, interaction: discord.Interaction, what: str) -> None: ...
    @run.autocomplete("what")
    async def suggest(self, interaction: discord.Interaction, typed: str) -> list:
        BODY
        return []
""",
}
#: Cogs that cannot be loaded, or that misbehave without being asked.
LOADING = {
    "import": "import no_such_module\nasync def setup(bot): ...",
    "syntax": "def broken(:",
    "exit": "import sys; sys.exit(3)",
    "setup": "async def setup(bot): raise RuntimeError",
    "load": """
class Cog(BASE, name="NAME"):
    async def cog_load(self) -> None:
        raise RuntimeError
""",
    "load hangs": """
class Cog(BASE, name="NAME"):
    async def cog_load(self) -> None:
        await asyncio.Event().wait()
""",
    "listener": """
class Cog(BASE, name="NAME"):
    @commands.Cog.listener()
    async def on_member_join(self, member: discord.Member) -> None:
        raise KeyError("broken")
""",
    "loop": """
class Cog(BASE, name="NAME"):
    @tasks.loop(seconds=0.01)
    async def poll(self) -> None:
        raise KeyError("broken")
    async def cog_load(self) -> None:
        self.poll.start()
""",
    "task": """
class Cog(BASE, name="NAME"):
    async def cog_load(self) -> None:
        self.task = asyncio.create_task(asyncio.Event().wait())
""",
    "unload": """
class Cog(BASE, name="NAME"):
    async def cog_unload(self) -> None:
        raise RuntimeError
""",
}
BASES = ("BaseCog", "commands.Cog")
FAILS_TO_LOAD = ("import", "syntax", "exit", "setup", "load", "load hangs")


@dataclass(frozen=True)
class Case:
    """One cog that misbehaves. `deed` None: while it is loaded."""

    name: str
    kind: str
    deed: str | None
    base: str

    @property
    def source(self) -> str:
        """The module."""
        setup = "\nbot = None\ngone, leaked = asyncio.Event(), []\nasync def setup(b):\n    global bot\n    bot = b\n"
        setup += f"    await b.add_cog(Cog({'b' if self.base == 'BaseCog' else ''}))\n"
        if self.deed is None:
            text = LOADING[self.kind].replace("BASE", self.base).replace("NAME", self.name)
            return text + setup if "class Cog" in text else text
        text = HANDLERS[self.kind].replace("NAME", self.name).replace("BASE", self.base)
        lines = [line.strip("\n") for line in DEEDS[self.deed].splitlines() if line.strip()]
        margin = min(len(line) - len(line.lstrip()) for line in lines)
        found = []
        for line in text.splitlines():
            indent = line[: len(line) - len(line.lstrip())]
            found += [indent + it[margin:] for it in lines] if line.strip() == "BODY" else [line]
        return "\n".join(found) + setup


def generate(count: int, seed: int) -> list[Case]:
    """Return every way to misbehave while loading, and a sample of all others."""
    every = list(itertools.product(HANDLERS, DEEDS, BASES))
    random.Random(seed).shuffle(every)
    loading = [(kind, None, base) for kind in LOADING for base in BASES]
    chosen = [*loading, *every][:count]
    return [Case(f"case{number}", kind, deed, base) for number, (kind, deed, base) in enumerate(chosen)]


def hurry(bot: Guildbook) -> None:
    """Shorten the times."""
    bot.invocations.defer_after, bot.invocations.bound = 0.3, 0.8
    bot.loader.setup_timeout = bot.loader.cancel_timeout = 0.5
    bot.logged_user_errors.limit = bot.logged_user_errors.per_key = 10_000


class Users:
    """Somebody who tries each cog."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        guild = next(iter(simulator.world.guilds.values()))
        self.guild_id, self.id = guild.id, guild.owner_id

    async def use(self, case: Case) -> InteractionResult:
        """Reach the handler that misbehaves."""
        where: dict[str, Any] = {"user_id": self.id, "guild_id": self.guild_id}
        if case.kind == "autocomplete":
            return await self.simulator.autocomplete(case.name, focused="what", **where)
        result = await self.simulator.run_command(
            case.name, subcommand="sub" if case.kind == "group" else None, **where
        )
        if case.kind in ("button", "view_check"):
            await result.wait_done()
            return await self.simulator.press(result, result.buttons["Pay"], user_id=self.id)
        if case.kind == "modal":
            await result.wait_done()
            return await self.simulator.submit(result, {"Text": "x"}, user_id=self.id)
        return result


def is_answered(case: Case, result: InteractionResult) -> bool:
    """Return whether the user knows what became of it. A button that did nothing is acknowledged."""
    if case.kind == "autocomplete":
        return result.choices == []
    if case.deed == "silent" and case.kind in ("button", "view_check"):
        return result.type is not None
    return bool(result.texts)


@pytest.mark.parametrize(
    ("count", "seed"),
    [
        pytest.param(45, 10, marks=pytest.mark.slow),
        *(pytest.param(100, seed, marks=EXHAUSTIVE) for seed in range(2, 6)),
    ],
)
async def test_misbehaving_cogs_are_answered_named_and_contained(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, count: int, seed: int,
) -> None:  # fmt: skip
    cogs = TemporaryCogs(tmp_path, monkeypatch)
    cases = generate(count, seed)
    for case in cases:
        cogs.write(case.name, case.source)
    cogs.write_answering("good", "as always")
    await database.execute("CREATE TABLE numbers (number int)")
    users, world = Users(simulator), simulator.world
    async with running_bot(database, simulator, extensions=cogs.extensions, configure=hurry) as bot:
        failed = {state.name for state in bot.loader.states() if state.state == "failed"}
        assert failed == {case.name for case in cases if case.deed is None and case.kind in FAILS_TO_LOAD}
        for batch in _batches(cases):
            results = [(case, await users.use(case)) for case in batch]
            world.random_event(random.Random(len(batch)))
            world.join(users.guild_id)
            for case, result in results:
                await result.wait_done(20, until=lambda result, case=case: is_answered(case, result))  # type: ignore[misc]
                if case.deed in ("raise", "leak", "block", "child", "query", "hang", "write", "abort", "exit"):
                    assert cogs.module(case.name) in {line.name for line in caplog.records}, case
        await until(lambda: not len(bot.invocations))
        await wait_until_mirrored(database, simulator)
        assert await database.fetchval("SELECT count(*) FROM numbers WHERE number = 2") == 0
        good = await simulator.run_command("good", user_id=users.id, guild_id=users.guild_id)
        assert (await good.wait_done()).content == "as always"
        for case in cases:
            if case.name not in failed:
                await bot.loader.unload(case.name)
        assert not [state for state in bot.loader.states() if state.state == "loaded" and state.name != "good"]
        world.join(users.guild_id)
        await wait_until_mirrored(database, simulator)
    for case in cases:
        if case.deed == "block":
            assert metrics.loop_blocks.labels(cogs.module(case.name))._value.get() >= 1, case


def _batches(cases: list[Case], size: int = 20) -> list[list[Case]]:
    used = [case for case in cases if case.deed is not None]
    return [used[start : start + size] for start in range(0, len(used), size)]
