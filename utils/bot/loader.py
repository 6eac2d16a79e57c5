"""Finds cogs and loads, unloads and reloads each in isolation: one that fails does not affect the others."""

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

from utils import packs
from utils.bot.cog_source import read_calls
from utils.bot.cog_warnings import SourceCalls, find_warnings
from utils.bot.command_sync import sync_commands
from utils.bot.positions import describe_position
from utils.bot.registrations import (
    LIFECYCLE_TIMEOUT,
    Registrations,
    is_within,
    remove_tables,
    runs_code_from,
    unload_orphaned_cogs,
)
from utils.exceptions import CogError, GuildbookError, ValidationError
from utils.tasks import cancel_and_wait

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

_log = logging.getLogger(__name__)

COGS_DIRECTORY = Path(__file__).resolve().parents[2] / "cogs"
#: The cog with the /cogs commands: it can be reloaded but not unloaded.
LOADER_COG = "cogs"
#: Seconds for a cog's set-up.
SETUP_TIMEOUT = 30.0
#: Seconds for a cog's tear-down: its tasks, then `stop`.
TEARDOWN_TIMEOUT = 2 * LIFECYCLE_TIMEOUT + 5.0
#: Seconds for a timed-out set-up or tear-down to react to its cancellation.
CANCEL_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class CogState:
    """The state of one cog."""

    #: The short name: `tally` for `cogs.tally`, `economy.shop` for `economy.cogs.shop` of the pack `economy`.
    name: str
    module: str
    state: Literal["loaded", "failed", "unloaded"] = "unloaded"
    #: Why it failed, in one line. For a loaded cog, why its last reload failed. None if nothing failed.
    reason: str | None = None
    #: How long the last load took, in seconds; None before the first.
    seconds: float | None = None
    #: The name of the pack that it belongs to; None for Guildbook's own.
    pack: str | None = None
    #: What of it cannot work with the present intents and settings, and what to do: one line each.
    warnings: tuple[str, ...] = ()


class Loader:
    """Loads, unloads and reloads the cogs of one bot.

    `modules` are the cogs' modules; None means everything in `cogs/` and in packs, listed again at each call. Timeouts
    are in seconds and may be changed at any time.
    """

    def __init__(
        self,
        bot: Guildbook,
        modules: Iterable[str] | None = None,
        *,
        setup_timeout: float = SETUP_TIMEOUT,
        teardown_timeout: float = TEARDOWN_TIMEOUT,
        cancel_timeout: float = CANCEL_TIMEOUT,
    ) -> None:
        self.setup_timeout: float = setup_timeout
        self.teardown_timeout: float = teardown_timeout
        self.cancel_timeout: float = cancel_timeout
        self._bot = bot
        self._modules: list[str] | None = None if modules is None else list(modules)
        self._states: dict[str, CogState] = {}
        self._registrations: dict[str, Registrations] = {}
        #: By module, the events that its source waits for and dispatches.
        self._calls: dict[str, SourceCalls] = {}
        #: The task that sets a cog up or tears it down.
        self._working: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    def states(self) -> list[CogState]:
        """Return the state of every cog that exists or is loaded, sorted by name."""
        return sorted(map(self._with_warnings, self._known().values()), key=lambda state: state.name)

    def modules(self) -> list[str]:
        """Return the modules of every cog that exists or is loaded."""
        return [state.module for state in self._known().values()]

    def is_setting_up(self) -> bool:
        """Return whether the caller is the set-up or the tear-down of a cog, and not a task that this started."""
        return self._working is not None and asyncio.current_task() is self._working

    def log_warnings(self) -> None:
        """Log what of the loaded cogs cannot work."""
        for state in self.states():
            _log_warnings(state)

    async def load_all(self) -> None:
        """Load every cog that is not loaded. Failures are logged. Does not register slash commands with Discord."""
        async with self._lock:
            for _, state in sorted(self._known().items()):
                if state.state != "loaded":
                    await self._load(state)

    async def load(self, name: str) -> CogState:
        """Load a cog by its short name and register its slash commands.

        Raises `CogError` if it fails, `ValidationError` if there is no such cog or it is loaded already.
        """
        async with self._lock:
            state = self._get(name)
            if state.state == "loaded":
                raise ValidationError(f"{name} is already loaded: reload it to apply a change")
            state = self._with_warnings(await self._load(state))
            await self._sync_commands()
        if state.state == "failed":
            raise CogError(f"{name} could not be loaded: {state.reason}")
        _log_warnings(state)
        return state

    async def unload(self, name: str) -> CogState:
        """Unload a cog by its short name. Raises `ValidationError` if it is not loaded or must stay loaded."""
        async with self._lock:
            state = self._get_loaded(name)
            if name == LOADER_COG:
                raise ValidationError(f"{name} cannot be unloaded, because it loads the other cogs: reload it instead")
            await self._unload(state.module, self._registrations.pop(state.module))
            state = self._set_state(replace(state, state="unloaded", reason=None))
            await self._sync_commands()
        return state

    async def reload(self, name: str) -> CogState:
        """Load a cog's changed code, by its short name.

        If the new code fails, the previous code is restored and `CogError` is raised. Raises `ValidationError` if the
        cog is not loaded.
        """
        async with self._lock:
            state = self._get_loaded(name)
            try:
                await asyncio.to_thread(_check_source, state.module)
            except Exception as exc:
                state = self._set_state(replace(state, reason=describe_error(exc)))
                raise CogError(f"{name} was not reloaded, the loaded code is unchanged: {state.reason}") from exc
            previous = _imported_modules(state.module)
            await self._unload(state.module, self._registrations.pop(state.module))
            new = await self._load(state)
            problem = new.reason
            if new.state == "failed":
                new = await self._load(state, previous)
                if new.state == "loaded":
                    self._set_state(replace(new, reason=problem))
            await self._sync_commands()
        if problem is not None:
            outcome = (
                "the previous code was restored"
                if new.state == "loaded"
                else f"and the previous code could not be restored ({new.reason})"
            )
            raise CogError(f"{name} was not reloaded, {outcome}: {problem}")
        new = self._with_warnings(new)
        _log_warnings(new)
        return new

    def _known(self) -> dict[str, CogState]:
        """Return the cogs that exist or are loaded by name, as recorded: without their warnings."""
        modules = find_modules() if self._modules is None else self._modules
        found = {short_name(module): _initial_state(module) for module in modules}
        known = {name: state for name, state in self._states.items() if name in found or state.state == "loaded"}
        return found | known

    # --- called with the lock held

    async def _load(self, state: CogState, previous: dict[str, ModuleType] | None = None) -> CogState:
        """Load a cog from its files, or from modules imported before, and record the result."""
        module, started = state.module, time.perf_counter()
        if (pack := packs.module_owner(module)) is not None and (problem := packs.problem(pack)) is not None:
            return self._set_state(replace(state, state="failed", reason=problem, seconds=None))  # logged when found
        if module in self._bot.extensions:  # a set-up that timed out completed later
            await self._unload(module, None)
        before = Registrations.capture(self._bot)
        _remove_modules(module)
        try:
            await self._run_isolated(
                self._load_extension(module, previous or {}), f"setup of {module}", self.setup_timeout
            )
        except Exception as exc:
            cause = exc.original if isinstance(exc, commands.ExtensionFailed) else exc
            _log.error("cog not loaded: %s: %r", module, cause, exc_info=cause)
            await self._unload(module, Registrations.capture(self._bot).added_since(before, module))
            return self._set_state(replace(state, state="failed", reason=describe_error(cause), seconds=None))
        seconds = round(time.perf_counter() - started, 3)
        self._registrations[module] = Registrations.capture(self._bot).added_since(before, module)
        self._calls[module] = await asyncio.to_thread(read_calls, list(_imported_modules(module)))
        _log.info("cog loaded: %s", module, extra={"seconds": seconds})
        return self._set_state(replace(state, state="loaded", reason=None, seconds=seconds))

    async def _load_extension(self, module: str, previous: dict[str, ModuleType]) -> None:
        try:
            if previous:
                with _reimport(module, previous):
                    await self._bot.load_extension(module)
            else:
                await asyncio.to_thread(_delete_bytecode, module)
                await self._bot.load_extension(module)
        except SystemExit as exc:
            raise CogError(f"{module} calls sys.exit({exc.code!r})") from exc

    async def _unload(self, module: str, added: Registrations | None) -> None:
        """Remove a cog even if its own tear-down fails. `added`: what it registered on the bot; None if unknown."""
        for _ in range(1 + len(self._bot.cogs)):
            if module not in self._bot.extensions:
                break
            # discord.py removes a cog before it calls cog_unload, so each attempt gets past one more failing cog.
            await self._tear_down(module, self._bot.unload_extension(module))
        await self._tear_down(module, unload_orphaned_cogs(module))
        if added is not None:
            await self._tear_down(module, added.remove(self._bot))
        await self._end_leaked_tasks(module)
        _remove_modules(module)

    async def _end_leaked_tasks(self, module: str) -> None:
        """Cancel and name the tasks that run a cog's code after its tear-down."""
        leaked = {
            task
            for task in asyncio.all_tasks()
            if task is not asyncio.current_task() and not task.cancelling() and runs_code_from(task, module)
        }
        for task in leaked:
            _log.warning(
                "task of %s cancelled, because the cog is unloaded: %s, at %s; with self.spawn it would have ended",
                module, task.get_name(), describe_position(task),
            )  # fmt: skip
        for task in await cancel_and_wait(leaked, self.cancel_timeout):
            _log.critical("task of %s ignored its cancellation and keeps running: %s, at %s", module, task.get_name(),
                          describe_position(task))  # fmt: skip

    async def _tear_down(self, module: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await self._run_isolated(work, f"tear-down of {module}", self.teardown_timeout)
        except Exception as exc:
            _log.error("cog removed, but its tear-down failed: %s: %r", module, exc, exc_info=exc)

    async def _run_isolated(self, work: Coroutine[Any, Any, None], name: str, timeout: float) -> None:
        """Run a cog's code in a task with an empty context, for at most `timeout` seconds.

        Code that ignores its cancellation keeps running in the background.
        """
        task = self._working = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        try:
            await asyncio.wait([task], timeout=timeout)
            if not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=self.cancel_timeout)
                if not task.done():
                    _log.critical("%s ignored its cancellation and keeps running in the background", name)
                elif not task.cancelled():
                    task.exception()  # retrieved, so that asyncio does not log it
                raise CogError(f"{name} took longer than {timeout:g} s")
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise CogError(f"{name} cancelled itself")
        task.result()

    async def _sync_commands(self) -> None:
        if self._bot.application_id is None:
            return
        await sync_commands(self._bot)

    def _with_warnings(self, state: CogState) -> CogState:
        registrations = self._registrations.get(state.module)
        if registrations is None or state.state != "loaded":
            return state
        awaited = self._calls.get(state.module, SourceCalls()).awaited
        own = frozenset[str]().union(*(calls.dispatched for calls in self._calls.values()))
        found = find_warnings(self._bot, state.name, registrations, awaited, own)
        return replace(state, warnings=tuple(found))

    def _set_state(self, state: CogState) -> CogState:
        self._states[state.name] = state
        return state

    def _get(self, name: str) -> CogState:
        states = self._known()
        if name not in states:
            names = ", ".join(sorted(states)) or "(no cogs)"
            raise ValidationError(f"no cog is named {name[:50]!r}: expected one of {names}")
        return states[name]

    def _get_loaded(self, name: str) -> CogState:
        state = self._get(name)
        if state.state != "loaded":
            raise ValidationError(f"{name} is not loaded: load it first")
        return state


def find_extensions(directory: Path = COGS_DIRECTORY) -> list[str]:
    """Return the modules and packages in the cogs' directory, except those whose names start with an underscore."""
    names = {path.stem for path in directory.glob("*.py")} | {
        path.parent.name for path in directory.glob("*/__init__.py")
    }
    return [f"{directory.name}.{name}" for name in sorted(names) if not name.startswith("_")]


def find_modules() -> list[str]:
    """Return the modules of all cogs: ours, then those of the packs."""
    return [*find_extensions(), *(module for pack in packs.active() for module in pack.cogs())]


def cog_paths() -> list[tuple[str, Path]]:
    """Return the short name of every cog, ours and those of the packs, with its file or its package's directory."""
    found = []
    for module in find_modules():
        pack = packs.module_owner(module)
        path = (COGS_DIRECTORY if pack is None else pack.directory / "cogs") / module.rpartition(".")[2]
        found.append((short_name(module), path if path.is_dir() else path.with_suffix(".py")))
    return found


def _initial_state(module: str) -> CogState:
    pack = packs.module_owner(module)
    return CogState(short_name(module), module, pack=None if pack is None else pack.name)


def short_name(module: str) -> str:
    """Return a cog's short name: `tally` for `cogs.tally`, `economy.shop` for `economy.cogs.shop` of a pack."""
    pack = packs.module_owner(module)
    return module.rpartition(".")[2] if pack is None else pack.short_name(module)


def _log_warnings(state: CogState) -> None:
    for warning in state.warnings:
        _log.warning("cog %s: %s", state.name, warning)


def describe_error(exc: BaseException) -> str:
    """Return an error as one line of at most 500 characters; messages of `GuildbookError` are not shortened."""
    if isinstance(exc, commands.NoEntryPointError):
        return "it has no `async def setup(bot)`"
    text = " ".join(str(exc).split())
    return text if isinstance(exc, GuildbookError) else f"{type(exc).__name__}: {text}"[:500]


def _check_source(module: str) -> None:
    """Read and compile a module's source. Raises what is wrong with it."""
    _delete_bytecode(module)
    spec = importlib.util.find_spec(module)
    if spec is None or not isinstance(spec.loader, importlib.abc.InspectLoader):
        return
    if spec.origin is not None and not Path(spec.origin).exists():
        raise CogError(f"{spec.origin} does not exist any more")
    spec.loader.get_code(module)


def _delete_bytecode(module: str) -> None:
    """Delete the compiled files of a module and its submodules.

    Python loads the compiled file if the source's size and its modification time in whole seconds are unchanged
    (Python's reference, "The import system", 5.4.7): an edit within the same second would go unnoticed.
    """
    importlib.invalidate_caches()
    with contextlib.suppress(ImportError, ValueError, OSError):  # the import that follows reports them
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return
        origin = Path(spec.origin)
        for file in origin.parent.rglob("*.py") if spec.submodule_search_locations else [origin]:
            Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


def _imported_modules(module: str) -> dict[str, ModuleType]:
    """Return a module and its submodules from `sys.modules`."""
    return {name: imported for name, imported in sys.modules.items() if is_within(name, module)}


def _remove_modules(module: str) -> None:
    """Remove a module, its submodules and their tables, so that they can be imported again."""
    for name in _imported_modules(module):
        del sys.modules[name]
    remove_tables(module)


class _ImportedLoader(importlib.abc.Loader):
    """Returns a module that was imported before instead of executing its file."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def _reimport(module: str, previous: dict[str, ModuleType]) -> Iterator[None]:
    """Within the block, importing `module` returns the module that was imported before."""
    imported = previous[module]
    spec = imported.__spec__
    sys.modules.update(previous)
    imported.__spec__ = importlib.machinery.ModuleSpec(module, _ImportedLoader(imported))
    try:
        yield
    finally:
        imported.__spec__ = spec
