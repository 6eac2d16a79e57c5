"""What all command lines share: errors as lines, progress bars, `--json`, and the books."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from utils.database import Pool
from utils.database.embedded import open_target
from utils.exceptions import DatabaseError, GuildbookError, SettingsError, ValidationError
from utils.logs import redact
from utils.operations.action import Outcome, Progress, Step, ignore_progress, record_action
from utils.settings import Settings, load_settings

#: Connections of a command line: the work, what goes on beside it, and the books.
CONNECTIONS = 4
#: The exit code after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED = 130

DataDir = Annotated[
    Path | None, typer.Option(help="Use the embedded server's data in this directory, whatever the settings say.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

#: The work of an action: the settings, the database, and whom to tell how it goes.
Work = Callable[[Settings, Pool, Progress], Awaitable[Outcome]]


@contextmanager
def plain_errors(*, as_json: bool = False) -> Iterator[None]:
    """Turn what goes wrong into lines for people and an exit code: 2 for settings and arguments, 1 for the rest."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("called off", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except GuildbookError as exc:
        told = redact(str(exc))
        typer.echo(json.dumps({"ok": False, "error": told}, indent=2) if as_json else told, err=not as_json)
        raise typer.Exit(2 if isinstance(exc, SettingsError | ValidationError) else 1) from None


def act(
    command: str,
    work: Work,
    *,
    data_dir: Path | None = None,
    as_json: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Run an action on the database of the settings, show its outcome, write it down, and exit.

    `command`: its name in `ops.admin_actions`, like "backup create"; `arguments`: what it was asked to do, without
    secrets. With `as_json`, standard output is one JSON object: what the outcome holds, or `{"error": …}`.
    """
    with plain_errors(as_json=as_json):
        settings = load_settings().with_data_dir(data_dir)
        with _shown(as_json) as progress:
            outcome = asyncio.run(_act(settings, command, work, dict(arguments or {}), progress))
        if as_json:
            typer.echo(json.dumps({"ok": outcome.ok, **outcome.data}, indent=2, default=str))
        else:
            typer.echo(redact(outcome.text))
        raise typer.Exit(0 if outcome.ok else 1)


async def _act(
    settings: Settings,
    command: str,
    work: Work,
    arguments: dict[str, Any],
    progress: Progress,
) -> Outcome:
    async with open_target(settings.direct_target, settings.data_dir) as target:
        database = Pool(target, pool_max=CONNECTIONS)
        try:
            await database.connect()
            outcome = await work(settings, database, progress)
        except GuildbookError as exc:
            await _note(database, command, arguments, f"Failed: {redact(str(exc))}")
            raise
        else:
            await _note(database, command, arguments, redact(outcome.text))
            return outcome
        finally:
            await database.close()


async def _note(database: Pool, command: str, arguments: Mapping[str, Any], result: str) -> None:
    if not database.is_connected:
        return  # nothing was done to it
    try:
        if await database.fetchval("SELECT to_regclass('ops.admin_actions') IS NULL"):
            return  # no schema of ours: there are no books
        await record_action(database, command, arguments, result)
    except DatabaseError as exc:
        typer.echo(f"this was not written down in ops.admin_actions: {redact(str(exc))}", err=True)


def _shown(as_json: bool) -> AbstractContextManager[Progress]:
    return nullcontext(ignore_progress) if as_json or not sys.stderr.isatty() else _bars()


@contextmanager
def _bars() -> Iterator[Progress]:
    """Draw a bar for each step on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(step: Step) -> None:
            if step.text not in tasks:
                tasks[step.text] = bars.add_task(step.text, total=step.total, figures="")
            figures = f"{step.done:,} {step.unit}" if step.done else ""
            bars.update(tasks[step.text], completed=step.done, total=step.total, figures=figures)

        yield show
