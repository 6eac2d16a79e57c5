"""Finds the cogs, and loads each apart from the others: what one of them does wrong costs that one alone."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import time
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from discord.ext import commands

from utils.bot.command_sync import register_commands
from utils.bot.registrations import LIFECYCLE_SECONDS, Registrations, end_cogs, forget_tables, is_within
from utils.exceptions import CogError, GuildbookError, ValidationError

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

_log = logging.getLogger(__name__)

COGS = Path(__file__).resolve().parents[2] / "cogs"
#: The cog that loads the others: it may be reloaded, never unloaded.
OURSELVES = "cogs"
#: Seconds that a cog's set-up may take.
COG_SECONDS = 30.0
#: Seconds that its end may take: that of its tasks, and `stop`.
END_SECONDS = 2 * LIFECYCLE_SECONDS + 5.0
#: Seconds that a set-up which was cancelled may take to notice.
CANCEL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class CogState:
    """How one cog is."""

    #: The short name, `tally` for `cogs.tally`.
    name: str
    module: str
    state: Literal["loaded", "failed", "unloaded"] = "unloaded"
    #: Why it failed, one line; for a loaded cog, why its last reload did not come about. None: all is well.
    reason: str | None = None
    #: Seconds that the last load took; None before the first.
    seconds: float | None = None


class Loader:
    """The cogs of one bot. `extensions`: their modules; None for everything in `cogs/`, looked up anew each time."""

    def __init__(self, bot: Guildbook, extensions: Iterable[str] | None = None) -> None:
        self._bot = bot
        self._given: list[str] | None = None if extensions is None else list(extensions)
        self._states: dict[str, CogState] = {}
        self._added: dict[str, Registrations] = {}
        self._lock = asyncio.Lock()

    def states(self) -> list[CogState]:
        """Return every cog that is there or was loaded, by name."""
        modules = found_extensions() if self._given is None else self._given
        found = {short_name(module): CogState(short_name(module), module) for module in modules}
        known = {name: state for name, state in self._states.items() if name in found or state.state == "loaded"}
        return sorted((found | known).values(), key=lambda state: state.name)

    async def load_all(self) -> None:
        """Load every cog; what fails is logged and left out. The slash commands are for the caller to register."""
        async with self._lock:
            for state in self.states():
                if state.state != "loaded":
                    await self._load(state)

    async def load(self, name: str) -> CogState:
        """Load a cog by its short name. Raises `CogError` when it fails, `ValidationError` when it is none."""
        async with self._lock:
            state = self._known(name)
            if state.state == "loaded":
                raise ValidationError(f"{name} is loaded already; reload it to take over a change")
            state = await self._load(state)
            await self._register()
        if state.state == "failed":
            raise CogError(f"{name} is left out: {state.reason}")
        return state

    async def unload(self, name: str) -> CogState:
        """Unload a cog by its short name. Raises `ValidationError` when it is not loaded, or has to stay."""
        async with self._lock:
            state = self._loaded(name)
            if name == OURSELVES:
                raise ValidationError(f"{name} stays: without it no cog could be loaded again; it can be reloaded")
            await self._unload(state.module, self._added.pop(state.module))
            state = self._keep(replace(state, state="unloaded", reason=None))
            await self._register()
        return state

    async def reload(self, name: str) -> CogState:
        """Load a cog's code anew, by its short name. Raises like `load`.

        When the new code does not come up, the former is set up again and `CogError` says so.
        """
        async with self._lock:
            state = self._loaded(name)
            try:
                await asyncio.to_thread(_compile, state.module)
            except Exception as exc:
                kept = self._keep(replace(state, reason=one_line(exc)))
                raise CogError(f"{name} was not reloaded, the loaded code goes on: {kept.reason}") from exc
            former = _modules(state.module)
            await self._unload(state.module, self._added.pop(state.module))
            new = await self._load(state)
            problem = new.reason
            if new.state == "failed":
                new = await self._load(state, former)
                if new.state == "loaded":
                    self._keep(replace(new, reason=problem))
            await self._register()
        if problem is not None:
            outcome = "the former code is back" if new.state == "loaded" else f"nor is the former code: {new.reason}"
            raise CogError(f"{name} was not reloaded, {outcome}: {problem}")
        return new

    # One at a time, under the lock.

    async def _load(self, state: CogState, former: dict[str, ModuleType] | None = None) -> CogState:
        """Load a cog, from its files or from the modules that it had, and keep how that went."""
        module, started = state.module, time.perf_counter()
        if module in self._bot.extensions:  # it came up after all, when it had been given up
            await self._unload(module, None)
        before = Registrations.of(self._bot)
        _forget(module)
        try:
            await _bounded(self._extension(module, former or {}), f"the set-up of {module}", COG_SECONDS)
        except Exception as exc:
            cause = exc.original if isinstance(exc, commands.ExtensionFailed) else exc
            _log.error("%s is left out, the bot goes on without it: %r", module, cause, exc_info=cause)
            await self._unload(module, Registrations.of(self._bot).since(before, module))
            return self._keep(replace(state, state="failed", reason=one_line(cause), seconds=None))
        seconds = round(time.perf_counter() - started, 3)
        self._added[module] = Registrations.of(self._bot).since(before, module)
        _log.info("%s is loaded", module, extra={"seconds": seconds})
        return self._keep(replace(state, state="loaded", reason=None, seconds=seconds))

    async def _extension(self, module: str, former: dict[str, ModuleType]) -> None:
        try:
            if former:
                with _at_hand(module, former):
                    await self._bot.load_extension(module)
            else:
                await asyncio.to_thread(_drop_bytecode, module)
                await self._bot.load_extension(module)
        except SystemExit as exc:
            raise CogError(f"{module} calls sys.exit({exc.code!r})") from exc

    async def _unload(self, module: str, added: Registrations | None) -> None:
        """Take a cog away, whatever its own end does. `added`: what it put on the bot; None: nobody knows."""
        for _ in range(1 + len(self._bot.cogs)):
            if module not in self._bot.extensions:
                break
            # discord.py lets go of a cog before it calls cog_unload: after an error the next attempt is without it.
            await self._end(module, self._bot.unload_extension(module))
        await self._end(module, end_cogs(module))
        if added is not None:
            await self._end(module, added.remove(self._bot))
        _forget(module)

    async def _end(self, module: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await _bounded(work, f"the end of {module}", END_SECONDS)
        except Exception as exc:
            _log.error("%s is taken away, but its end failed: %r", module, exc, exc_info=exc)

    async def _register(self) -> None:
        if self._bot.application_id is None:
            return
        try:
            await register_commands(self._bot)
        except GuildbookError as exc:
            _log.warning("slash commands may be registered again at the next start: %s", exc)

    def _keep(self, state: CogState) -> CogState:
        self._states[state.name] = state
        return state

    def _known(self, name: str) -> CogState:
        states = {state.name: state for state in self.states()}
        if name not in states:
            raise ValidationError(f"there is no cog {name[:50]!r}: there are {', '.join(states) or 'none'}")
        return states[name]

    def _loaded(self, name: str) -> CogState:
        state = self._known(name)
        if state.state != "loaded":
            raise ValidationError(f"{name} is not loaded: load it")
        return state


def found_extensions(directory: Path = COGS) -> list[str]:
    """Return the modules in the cogs' directory, those that begin with an underscore excepted."""
    names = {path.stem for path in directory.glob("*.py")} | {
        path.parent.name for path in directory.glob("*/__init__.py")
    }
    return [f"{directory.name}.{name}" for name in sorted(names) if not name.startswith("_")]


def short_name(module: str) -> str:
    """Return the name that people use for a cog's module."""
    return module.rpartition(".")[2]


def one_line(exc: BaseException) -> str:
    """Return an error as one line."""
    if isinstance(exc, commands.NoEntryPointError):
        return "it has no `async def setup(bot)`"
    text = " ".join(str(exc).split())
    return text if isinstance(exc, GuildbookError) else f"{type(exc).__name__}: {text}"[:500]


async def _bounded(work: Coroutine[Any, Any, None], what: str, seconds: float) -> None:
    """Run somebody's code in a task and an empty context of its own, for so many seconds at most.

    Code that does not even end when it is cancelled is left alone after a few seconds more.
    """
    task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=CANCEL_SECONDS)
            if not task.done():
                _log.critical("%s cannot be cancelled, and goes on in the background", what)
            elif not task.cancelled():
                task.exception()
            raise CogError(f"{what} took longer than {seconds:g} s")
    except asyncio.CancelledError:
        task.cancel()
        raise
    if task.cancelled():
        raise CogError(f"{what} was cancelled from within")
    task.result()


def _compile(module: str) -> None:
    """Read and compile a module's source; what is wrong with it is raised."""
    _drop_bytecode(module)
    spec = importlib.util.find_spec(module)
    if spec is None or not isinstance(spec.loader, importlib.abc.InspectLoader):
        return
    if spec.origin is not None and not Path(spec.origin).exists():
        raise CogError(f"{spec.origin} is no longer there")
    spec.loader.get_code(module)


def _drop_bytecode(module: str) -> None:
    """Let a module's files be compiled anew, those of its parts too.

    Python takes a file of the same size and the same second for the one that it has compiled (Python's reference, "The
    import system", 5.4.7), and so would load the former code of a file that was just written.
    """
    importlib.invalidate_caches()
    with contextlib.suppress(ImportError, ValueError, OSError):  # whoever loads it says what is wrong
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return
        origin = Path(spec.origin)
        for file in origin.parent.rglob("*.py") if spec.submodule_search_locations else [origin]:
            Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


def _modules(module: str) -> dict[str, ModuleType]:
    return {name: it for name, it in sys.modules.items() if is_within(name, module)}


def _forget(module: str) -> None:
    for name in _modules(module):
        del sys.modules[name]
    forget_tables(module)


class _Kept(importlib.abc.Loader):
    """Gives a module that there was before, instead of running its file."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _at_hand(module: str, former: dict[str, ModuleType]) -> Iterator[None]:
    """Let a module be imported as it was, for the duration of a block."""
    kept = former[module]
    spec = kept.__spec__
    sys.modules.update(former)
    kept.__spec__ = importlib.machinery.ModuleSpec(module, _Kept(kept))
    try:
        yield
    finally:
        kept.__spec__ = spec
