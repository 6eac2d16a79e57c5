"""What all commands share: errors as lines and exit codes, progress bars, `--json`, and the audit log."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, TypeVar

import stamina.instrumentation
import typer

from utils.database import ConnectTarget, Pool
from utils.database.address import open_target
from utils.exceptions import DatabaseError, GuildbookError, SettingsError, ValidationError
from utils.logs import redact
from utils.operations.action import Outcome, Progress, Step, ignore_progress, record_action
from utils.settings import Settings, load_settings

#: Connections of a command: the action itself, what it runs concurrently, and the audit log.
CONNECTIONS = 4
#: The exit code after Ctrl-C, as in shells: 128 + SIGINT.
INTERRUPTED = 130

DataDir = Annotated[
    Path | None, typer.Option(help="Use the embedded server's data in this directory, whatever the settings say.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

#: An action: takes the settings, a pool, and a callback for its progress.
Action = Callable[[Settings, Pool, Progress], Awaitable[Outcome]]
ResultT = TypeVar("ResultT")


@contextmanager
def exit_on_errors(*, as_json: bool = False) -> Iterator[None]:
    """Print a `GuildbookError` as a line and exit: with code 2 for settings and arguments, 1 for all else."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except GuildbookError as exc:
        message = redact(str(exc))
        typer.echo(json.dumps({"ok": False, "error": message}, indent=2) if as_json else message, err=not as_json)
        raise typer.Exit(2 if isinstance(exc, SettingsError | ValidationError) else 1) from None


def run_action(
    command: str,
    action: Action,
    *,
    data_dir: Path | None = None,
    as_json: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Run an action on the database of the settings, print its outcome, record it in the audit log, and exit.

    With `as_json`, standard output is one JSON object: the outcome's data, or `{"error": …}`.

    Parameters
    ----------
    command: the name for `ops.admin_actions`, such as "backup create".
    data_dir: use the embedded server's data there instead.
    arguments: what the audit log records of the command's arguments; no secrets.
    """
    with exit_on_errors(as_json=as_json):
        settings = load_settings().with_data_dir(data_dir)
        with _open_progress(as_json) as progress:
            outcome = asyncio.run(_run_recorded(settings, command, action, dict(arguments or {}), progress))
        if as_json:
            typer.echo(json.dumps({"ok": outcome.ok, **outcome.data}, indent=2, default=str))
        else:
            typer.echo(redact(outcome.text))
        raise typer.Exit(0 if outcome.ok else 1)


def run_with_pool(settings: Settings, data_dir: Path | None, work: Callable[[Pool], Awaitable[ResultT]]) -> ResultT:
    """Return what `work` returns, given a pool on the database of the settings. Records nothing."""
    settings = settings.with_data_dir(data_dir)

    async def run() -> ResultT:
        async with open_target(settings.direct_target, settings.data_dir, schema=settings.db_schema) as target:
            pool = make_pool(settings, target, connections=2)
            await pool.connect()
            try:
                return await work(pool)
            finally:
                await pool.close()

    return asyncio.run(run())


def make_pool(settings: Settings, target: ConnectTarget, *, connections: int) -> Pool:
    """Return a pool for a command, with the times of the settings. Its retries are not shown: the error says it all."""
    stamina.instrumentation.set_on_retry_hooks(())
    return Pool(
        target,
        pool_max=connections,
        connect_timeout=settings.db_connect_timeout,
        command_timeout=settings.db_command_timeout,
        acquire_timeout=settings.db_acquire_timeout,
        retry_seconds=settings.db_retry_seconds,
        retry_max_seconds=settings.db_retry_max_seconds,
        logs_retries=False,
    )


async def _run_recorded(
    settings: Settings, command: str, action: Action, arguments: dict[str, Any], progress: Progress
) -> Outcome:
    async with open_target(settings.direct_target, settings.data_dir, schema=settings.db_schema) as target:
        pool = make_pool(settings, target, connections=CONNECTIONS)
        try:
            await pool.connect()
            outcome = await action(settings, pool, progress)
        except GuildbookError as exc:
            await _record(pool, command, arguments, f"Failed: {redact(str(exc))}")
            raise
        else:
            await _record(pool, command, arguments, redact(outcome.text))
            return outcome
        finally:
            await pool.close()


async def _record(pool: Pool, command: str, arguments: Mapping[str, Any], result: str) -> None:
    if not pool.is_connected:
        return
    try:
        if await pool.fetchval("SELECT to_regclass('ops.admin_actions') IS NULL"):
            return  # the database has no schema
        await record_action(pool, command, arguments, result)
    except DatabaseError as exc:
        typer.echo(f"could not record this in ops.admin_actions: {redact(str(exc))}", err=True)


def _open_progress(as_json: bool) -> AbstractContextManager[Progress]:
    return nullcontext(ignore_progress) if as_json or not sys.stderr.isatty() else _draw_bars()


@contextmanager
def _draw_bars() -> Iterator[Progress]:
    """Draw a progress bar for each step on standard error."""
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
