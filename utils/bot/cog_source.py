"""What cogs use, read from their source without running it: intents, listeners, `wait_for`, text commands."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from importlib.abc import InspectLoader
from pathlib import Path

import discord

from utils.bot.cog_warnings import AwaitedEvent, CogUse, ListenerUse, SourceCalls, find_problems
from utils.bot.listeners import FROM_MIRROR, Present
from utils.bot.prefixes import HOOK
from utils.mirror.discord.intents import PRIVILEGED, mirror_intents, parse_intents
from utils.operations.doctor.context import DoctorContext

#: Functions of `discord.ext.commands` that make a text command, and whether it is a slash command too.
_COMMANDS = {"command": False, "group": False, "hybrid_command": True, "hybrid_group": True}


def read_calls(modules: Iterable[str]) -> SourceCalls:
    """Return which events the source of modules waits for and dispatches, as far as they are literals. Blocking.

    Sources that cannot be read are left out.
    """
    awaited: list[AwaitedEvent] = []
    dispatched: set[str] = set()
    for module in modules:
        with contextlib.suppress(ImportError, SyntaxError, ValueError, OSError):
            spec = importlib.util.find_spec(module)
            source = spec.loader.get_source(module) if spec and isinstance(spec.loader, InspectLoader) else None
            if source is not None and (".wait_for" in source or ".dispatch" in source):
                tree = ast.parse(source)
                awaited += (AwaitedEvent(event, f"{module}:{line}") for event, line in _calls(tree, "wait_for"))
                dispatched |= {event for event, _ in _calls(tree, "dispatch")}
    return SourceCalls(awaited, frozenset(dispatched))


def read_source(name: str, path: Path) -> CogUse:
    """Return what a cog uses, a file or a package. Blocking. Raises nothing: what cannot be read is left out.

    Only literals are understood: a listener that is added in another way is not found.
    """
    use = CogUse(name)
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        with contextlib.suppress(SyntaxError, ValueError, OSError):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            use.awaited += (AwaitedEvent(event, f"{file.name}:{line}") for event, line in _calls(tree, "wait_for"))
            use.dispatched |= {event for event, _ in _calls(tree, "dispatch")}
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    _read_class(node, use)
    return use


class SourceContext(DoctorContext):
    """What the checks examine where no bot runs: of the cogs, their source.

    `cogs` returns their names and paths. It is called when the settings have been read, which say where packs are.
    """

    def __init__(self, cogs: Callable[[], Iterable[tuple[str, Path]]], *, data_dir: Path | None = None) -> None:
        super().__init__(data_dir=data_dir)
        self._cogs = [read_source(name, path) for name, path in cogs()]

    def cog_problems(self) -> list[str]:
        """Return what of the cogs cannot work with the settings."""
        settings = self.settings
        intents = mirror_intents(settings.member_cache) | parse_intents(settings.intents)
        for use in self._cogs:
            intents = intents | use.intents
        provided = FROM_MIRROR if settings.events_from_mirror else frozenset()
        own = frozenset().union(*(use.dispatched for use in self._cogs))
        present = Present(intents, settings.member_cache, settings.message_cache, provided, own)
        has_prefix = bool(settings.command_prefix) or any(use.has_hook for use in self._cogs)
        return [
            f"{use.name}: {problem}"
            for use in self._cogs
            for problem in find_problems(use, present, has_prefix=has_prefix)
        ]

    def cog_intents(self) -> dict[str, list[str]]:
        """Return the cogs that declare each privileged intent."""
        found = {name: [use.name for use in self._cogs if getattr(use.intents, name)] for name in PRIVILEGED}
        return {name: cogs for name, cogs in found.items() if cogs}


def _read_class(node: ast.ClassDef, use: CogUse) -> None:
    for statement in node.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == "intents" for target in targets):
                use.intents |= _intents(statement.value)
        elif isinstance(statement, ast.AsyncFunctionDef):
            use.has_hook |= statement.name == HOOK
            for decorator in statement.decorator_list:
                _read_decorator(decorator, statement, node.name, use)


def _read_decorator(decorator: ast.expr, function: ast.AsyncFunctionDef, owner: str, use: CogUse) -> None:
    if not (isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute)):
        return
    made, given = decorator.func.attr, _given_name(decorator)
    if made == "listener":
        read = frozenset(part.attr for part in ast.walk(function) if isinstance(part, ast.Attribute))
        event = (given or function.name).removeprefix("on_")
        use.listeners.append(ListenerUse(event, f"{owner}.{function.name}", read))
    elif made in _COMMANDS and isinstance(decorator.func.value, ast.Name) and decorator.func.value.id == "commands":
        (use.hybrid if _COMMANDS[made] else use.text).append(given or function.name)


def _given_name(call: ast.Call) -> str | None:
    values = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "name")]
    return next((it.value for it in values if isinstance(it, ast.Constant) and isinstance(it.value, str)), None)


def _intents(value: ast.expr | None) -> discord.Intents:
    """Return the intents that an expression gives; all of them if it is too involved to tell."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
        return _intents(value.left) | _intents(value.right)
    if isinstance(value, ast.Call) and not value.args and isinstance(value.func, ast.Attribute):
        flags = {keyword.arg: getattr(keyword.value, "value", None) for keyword in value.keywords}
        if value.func.attr in ("all", "default", "none") and not flags:
            return getattr(discord.Intents, value.func.attr)()  # type: ignore[no-any-return]
        if value.func.attr == "Intents" and flags.keys() <= discord.Intents.VALID_FLAGS.keys():
            return discord.Intents(**{str(name): flag is True for name, flag in flags.items()})
    return discord.Intents.all()


def _calls(tree: ast.AST, method: str) -> Iterator[tuple[str, int]]:
    """Yield the first argument, if it is a text, and the line of each call of a method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value, node.lineno
