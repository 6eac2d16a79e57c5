"""Writes docs/reference/ and docs/images/ from the code: `make docs`.

A test fails when a page differs from what this would write, or a picture was drawn from other figures or code.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import typer
from discord import app_commands
from discord.ext import commands
from prometheus_client.metrics import MetricWrapperBase
from pydantic_core import PydanticUndefined
from sqlalchemy import Column, Computed, Table
from sqlalchemy.dialects import postgresql

import bot
from docs import pictures
from docs.forms import FORMS
from models import Base
from models.base import Erase, Part, part_of
from utils.bot.listeners import ALWAYS, EVENTS
from utils.cli.common import EXIT_CODES
from utils.mirror.discord import permissions
from utils.operations.doctor import CHECKS
from utils.service import metrics
from utils.settings import Settings

DIRECTORY = Path(__file__).parent / "reference"
#: The modules that cog authors import, by page: the public names of each are documented there.
MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bot-db": ("`bot.db`", ("utils.db",)),
    "base-cog": ("BaseCog", ("utils.base_cog", "utils.cache")),
    "documents": ("Documents", ("utils.documents",)),
    "repositories": ("Repositories", ("utils.repositories",)),
    "packs": ("Packs", ("utils.packs.settings", "utils.packs.locales")),
    "testing": ("Testing", ("testing", "testing.clock")),
    "errors": ("Errors", ("utils.exceptions",)),
}
#: Guildbook's cogs. A user's own, beside them, are not documented here.
OWN_COGS = ("cogs.cogs", "cogs.db", "cogs.mirror", "cogs.preferences")
NOTE = "<!-- Written by `make docs`. Change the docstrings, not this page. -->"


def pages() -> dict[str, str]:
    """Return the text of every page by its name."""
    written = {
        "settings": settings_page(),
        "tables": tables_page(),
        "commands": commands_page(),
        "permissions": permissions_page(),
        "events": events_page(),
        "metrics": metrics_page(),
        "documented-forms": forms_page(),
        **{name: module_page(title, modules) for name, (title, modules) in MODULES.items()},
    }
    return {name: re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n" for name, text in written.items()}


# Settings.


def settings_page() -> str:
    """Return a table of all settings: variable, default, what it means."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default if field.default is not PydanticUndefined else "required"
        shown = "" if default in (None, frozenset(), ()) else f"`{_plain(default)}`"
        rows.append(f"| `{name.upper()}` | {shown} | {_cell(field.description or '')} |")
    intro = "Environment variables, or lines of `.env`. They are validated once, at start; an invalid value ends the"
    return "\n".join(["# Settings", "", NOTE, "", f"{intro} process with exit code 2.", "", *rows])


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


# Permissions.


def permissions_page() -> str:
    """Return a table of the permissions that the mirror uses."""
    rows = ["| permission | what is mirrored with it | what is missed without it |", "| --- | --- | --- |"]
    for used in permissions.USED:
        name = used.name if used.alternative is None else f"{used.name}, or {used.alternative[0]}"
        rows.append(f"| *{name}* | {_cell(used.brings)} | {_cell(used.missed)} |")
    text = """
The address in the [README](../../README.md#the-bot-on-discord-in-five-steps) asks for these permissions. Each is
optional: guilds, users, members, roles, and joins and leaves need none of them.

What Discord would refuse is not requested: archived threads of a channel are listed only if the bot's roles and the
channel's overwrites allow it, and what was skipped is read as soon as they do. A thread that was mirrored before stays
as it was last seen.

`/mirror status` shows the guilds that do not grant a permission, and channels whose overwrites deny one; `python bot.py
doctor` shows the former without a running bot. To grant what is missing, open the same address again and choose the
guild.
"""
    return "\n".join(["# Permissions", "", NOTE, text, *rows])


# Events.


def events_page() -> str:
    """Return a table of discord.py's events and what each needs."""
    rows = ["| event | any of these intents | in memory | instead |", "| --- | --- | --- | --- |"]
    for name, event in sorted(EVENTS.items()):
        needed = ", ".join(f"`{intent}`" for intent in event.intents) if event.never is None else event.never
        caches = " and ".join(event.caches)
        rows.append(
            f"| `on_{name}` | {needed} | {caches} | {'' if event.instead is None else f'`on_{event.instead}`'} |"
        )
    always = ", ".join(f"`on_{name}`" for name in sorted(ALWAYS))
    text = """
What discord.py needs to dispatch an event: one of the intents, and all of the caches. Messages are in memory with
`MESSAGE_CACHE`, members with `MEMBER_CACHE=all` (with `voice` only those in voice channels, with `none` only the bot
itself). The mirror's own intents are `guilds`, `members`, `moderation` and `guild_messages`; cogs and `INTENTS` add
others ([Porting a bot](../how-to/porting.md)). These events are dispatched whenever the bot is connected:
"""
    return "\n".join(["# Events", "", NOTE, text + always + ".", "", *rows])


# Metrics.


def metrics_page() -> str:
    """Return a table of the metrics of GET /metrics."""
    rows = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    for value in vars(metrics).values():
        if isinstance(value, MetricWrapperBase):
            (found,) = value.describe()
            name = f"{found.name}_total" if found.type == "counter" else found.name
            labels = ", ".join(f"`{label}`" for label in value._labelnames)
            rows.append(f"| `{name}` | {found.type} | {labels} | {_cell(found.documentation)} |")
    text = """
`GET /metrics` on the health server's port (`PORT` or `HEALTH_PORT`), in the text format of Prometheus. The standard
metrics of the process, of Python and of its garbage collector are there too.
"""
    return "\n".join(["# Metrics", "", NOTE, text, *rows])


# Tables.


def tables_page() -> str:
    """Return every table with its columns."""
    parts = [
        "# Tables",
        "",
        NOTE,
        "",
        "Columns marked 🔑 are the primary key. *Erase* says what erasing a person does to the",
    ]
    parts += ["column: rows are found by a *subject* column, and a *clear* column is emptied in them.", ""]
    for name in sorted(Base.metadata.tables, key=lambda name: ("." in name, name)):
        table = Base.metadata.tables[name]
        parts += [
            f"## {name}",
            "",
            _comment_of(table),
            "",
            "| column | type | null | erase | |",
            "| --- | --- | --- | --- | --- |",
        ]
        parts += [_column(column) for column in table.columns]
        parts.append("")
    return "\n".join(parts)


def _comment_of(table: Table) -> str:
    for mapper in Base.registry.mappers:
        if mapper.local_table is table and mapper.class_.__doc__:
            return inspect.cleandoc(mapper.class_.__doc__)
    return table.comment or ""


def _column(column: Column[Any]) -> str:
    erase = column.info.get("erase", Erase.KEEP)
    notes = []
    if column.comment:
        notes.append(_cell(column.comment))
    if isinstance(column.server_default, Computed):
        notes.append("generated")
    part = part_of(column)
    if part is Part.TOMBSTONE:
        notes.append("tombstone: when it was removed; NULL while it is there")
    elif part is Part.QUIET:
        notes.append("changes without anyone acting: no history")
    key = " 🔑" if column.primary_key else ""
    kind = column.type.compile(dialect=postgresql.dialect()).lower()  # type: ignore[no-untyped-call]
    null = "yes" if column.nullable else ""
    shown = "" if erase is Erase.KEEP else str(erase.value)
    return f"| `{column.name}`{key} | {kind} | {null} | {shown} | {'; '.join(notes)} |"


# Forms.


def forms_page() -> str:
    """Return tables of the forms that bots use which were written for other documentation."""
    text = """
Bots that were written for other documentation, for asyncpg or for SQLAlchemy, use these forms. Each works as it is
written here; `db` is `self.db`, the same as `bot.db`. [Porting a bot](../how-to/porting.md) says what else differs.
"""
    parts = ["# Documented forms", "", NOTE.replace("the docstrings", "docs/forms.py"), text]
    for section, forms in FORMS.items():
        parts += [f"## {section}", "", "| form | returns | what differs |", "| --- | --- | --- |"]
        parts += [f"| `{_cell(form.code)}` | {_cell(form.returns)} | {_cell(form.differs)} |" for form in forms]
        parts.append("")
    return "\n".join(parts)


# Modules.


def module_page(title: str, names: tuple[str, ...]) -> str:
    """Return the public names of some modules with signatures and docstrings."""
    parts = [f"# {title}", "", NOTE, ""]
    for name in names:
        module = importlib.import_module(name)
        parts += [f"`{name}`: {_first(module.__doc__)}", ""]
        for public in public_names(module):
            parts += _member(public, getattr(module, public))
    return "\n".join(parts)


def public_names(module: ModuleType) -> list[str]:
    """Return what a module offers: `__all__`, or else the classes and functions that it defines itself."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def _member(name: str, value: Any) -> list[str]:
    if inspect.isclass(value):
        bases = ", ".join(f"`{base.__name__}`" for base in value.__bases__ if base is not object)
        parts = [f"## {name}", "", f"*Class*{f', a {bases}' if bases else ''}.", "", _doc(value), ""]
        for own, method in _methods(value):
            parts += [f"### {name}.{own}", "", *_signature(own, method), "", _doc(method), ""]
        return parts
    if inspect.ismodule(value):
        parts = [f"## {name}", "", _doc(value), ""]
        for own in public_names(value):
            parts += [line.replace("## ", f"### {name}.", 1) for line in _member(own, getattr(value, own))]
        return parts
    if callable(value):
        return [f"## {name}", "", *_signature(name, value), "", _doc(value), ""]
    return [f"## {name}", "", f"`{value!r}`", ""]


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    ours = [base for base in cls.__mro__ if base.__module__.split(".")[0] in ("utils", "models", "testing")]
    seen: set[str] = set()
    for base in ours:
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            raw = value.func if isinstance(value, cached_property) else value
            if isinstance(raw, (FunctionType, property, classmethod, staticmethod)):
                seen.add(name)
                yield name, raw


def _signature(name: str, value: Any) -> list[str]:
    function: Callable[..., Any] | None = value
    if isinstance(value, property):
        return []
    if isinstance(value, (classmethod, staticmethod)):
        function = value.__func__
    assert function is not None
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return []
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    shown = re.sub(r"<[\w.]+\.(\w+) object at 0x[0-9a-f]+>", r"<\1>", str(signature.replace(parameters=parameters)))
    shown = shown.replace("'", "")
    prefix = "await " if inspect.iscoroutinefunction(function) else ""
    return ["```text", f"{prefix}{name}{shown}", "```"]


def _doc(value: Any) -> str:
    text = inspect.getdoc(value.__func__ if isinstance(value, (classmethod, staticmethod)) else value) or ""
    # A heading inside a docstring, or an example, keeps its shape; the page's own headings stay above it.
    return re.sub(r"^(#+ )", r"####\1", text, flags=re.MULTILINE)


def _first(text: str | None) -> str:
    return inspect.cleandoc(text or "").split("\n\n")[0].replace("\n", " ")


# Commands.


def commands_page() -> str:
    """Return the slash commands and the command line."""
    parts = ["# Commands", "", NOTE, "", "## In Discord", ""]
    for command in sorted(_slash_commands(), key=lambda command: command.qualified_name):
        parts += [f"### /{command.qualified_name}", "", command.description, ""]
        if command.parameters:
            parts += ["| option | required | meaning |", "| --- | --- | --- |"]
            for option in command.parameters:
                required = "yes" if option.required else ""
                parts.append(f"| `{option.display_name}` | {required} | {_cell(str(option.description))} |")
            parts.append("")
    parts += [*_pictures(), "## In a shell", "", *_exit_codes()]
    root = typer.main.get_command(bot.app)
    for path, shell_command in _shell_commands("python bot.py", root):
        parts += [f"### {path}", "", _first(shell_command.help), ""]
        shown = [parameter for parameter in shell_command.params if parameter.name != "help"]
        if shown:
            parts += ["| argument | default | meaning |", "| --- | --- | --- |", *map(_parameter, shown), ""]
        if shell_command.name == "doctor":
            parts += _checks()
    return "\n".join(parts)


def _checks() -> list[str]:
    text = "`/db health` does the same in the running bot. Each check is bounded, and affects no other:"
    rows = [f"| {check.name} | {_cell(_first(check.function.__doc__))} |" for check in CHECKS]
    return [text, "", "| check | what it does |", "| --- | --- |", *rows, ""]


def _exit_codes() -> list[str]:
    rows = [f"| {code} | {_cell(meaning)} |" for code, meaning in EXIT_CODES.items()]
    text = """
With `--json`, a command prints one JSON object on standard output and nothing else; progress, questions and warnings go
to standard error. `"ok"` is true if and only if the exit code is 0. An error is `{"ok": false, "error": "…"}`; without
`--json` it is one line on standard error. If nobody reads the output any more (`| head`), the command goes on and
prints nothing more. `python bot.py db psql` ends with the exit code of psql.
"""
    return ["### Exit codes", "", "| code | meaning |", "| --- | --- |", *rows, *text.splitlines(), ""]


def _pictures() -> list[str]:
    """Return a section with the pictures of /db stats."""
    text = """
The sizes of the largest tables and, from the second sample on, the growth of all tables together. A sample is taken
every six hours, and after a month the first of each day is kept. Times are in UTC.
"""
    parts = ["### The picture of /db stats", text]
    for name, caption, _ in pictures.PICTURES:
        parts += [f"{caption}:", "", f"![{caption}](../images/{name})", ""]
    return parts


def _slash_commands() -> Iterator[app_commands.Command[Any, ..., Any]]:
    for name in OWN_COGS:
        for cls in vars(importlib.import_module(name)).values():
            if inspect.isclass(cls) and issubclass(cls, commands.Cog) and cls.__module__ == name:
                for command in cls.__cog_app_commands__:
                    children = list(command.walk_commands()) if isinstance(command, app_commands.Group) else [command]
                    yield from (child for child in children if isinstance(child, app_commands.Command))


def _shell_commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Walk typer's commands. They are click's, a copy of which typer brings along without types."""
    children: dict[str, Any] = getattr(command, "commands", {})
    if not children or command.invoke_without_command:
        yield path, command
    for name, child in sorted(children.items()):
        yield from _shell_commands(f"{path} {name}", child)


def _parameter(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    names = ", ".join(f"`{name}`" for name in parameter.opts) if is_option else f"`{str(parameter.name).upper()}`"
    default = parameter.default
    has_default = default not in (None, False, ()) and not callable(default)
    return f"| {names} | {f'`{_plain(default)}`' if has_default else ''} | {_cell(parameter.help or '')} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Write the pages and the pictures, and remove those that are no longer written."""
    DIRECTORY.mkdir(exist_ok=True)
    texts = pages()
    for name, text in texts.items():
        (DIRECTORY / f"{name}.md").write_text(text, encoding="utf-8")
    for path in DIRECTORY.glob("*.md"):
        if path.stem not in texts:
            path.unlink()
    pictures.write()


if __name__ == "__main__":
    main()
