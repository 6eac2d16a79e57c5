"""What all commands share: errors as lines and exit codes, progress bars, `--json`, and the audit log."""

from __future__ import annotations

import asyncio
import json
import os
import select
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO, TypeVar

import stamina.instrumentation
import typer
from typer.core import TyperGroup

from utils.database import ConnectTarget, Pool
from utils.database.address import open_target
from utils.exceptions import DatabaseError, GuildbookError, NotConfirmed, SettingsError, ValidationError
from utils.logs import redact
from utils.operations.action import Outcome, Progress, Step, ignore_progress, record_action
from utils.settings import Settings, load_settings

#: Connections of a command: the action itself, what it runs concurrently, and the audit log.
CONNECTIONS = 4
#: The exit code after Ctrl-C, as in shells: 128 + SIGINT.
INTERRUPTED = 130
#: The exit codes of all commands, for docs/reference/commands.md.
EXIT_CODES: Mapping[int, str] = {
    0: "done, or there was nothing to do",
    1: "failed, or completed and found a problem: a check failed, a backup is damaged, a revision is pending",
    2: "settings or arguments are wrong, or a question was not confirmed; nothing was done",
    3: "done, but something was left out: an import could not use every entry",
    INTERRUPTED: "interrupted with Ctrl-C",
}
#: The command as the documentation writes it.
PROGRAM = "python bot.py"


def parse_path(text: str | Path) -> Path:
    """Return an argument as a path. An empty one would mean the current directory: a variable that is not set."""
    if isinstance(text, str) and not text.strip():
        raise typer.BadParameter("it is empty: name a file or a directory (. is the current one)")
    return Path(text)


DataDir = Annotated[
    Path | None,
    typer.Option(
        parser=parse_path,
        metavar="PATH",
        help="Use the embedded server's data in this directory, whatever the settings say.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

#: An action: takes the settings, a pool, and a callback for its progress.
Action = Callable[[Settings, Pool, Progress], Awaitable[Outcome]]
ResultT = TypeVar("ResultT")


class CommandGroup(TyperGroup):
    """A group of commands, whose help shows what each of them is for in a whole sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands. click would clip each to one line."""
        rows = [(name, command.get_short_help_str(sys.maxsize)) for name, command in self.commands.items()]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show the help if no command is given but one is needed."""
        if not args and not self.invoke_without_command:
            typer.echo(ctx.get_help(), err=True)
            raise typer.Exit(2)
        return super().parse_args(ctx, args)


class RootCommand(CommandGroup):
    """All commands: turns every error into one line, or one JSON object with `--json`, and an exit code."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run the command in `args` (None: the process's), and exit."""
        arguments = list(sys.argv[1:] if args is None else args)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                with suppress(OSError):  # which one raises that was redirected after Python began
                    stream.reconfigure(errors="backslashreplace")  # what it cannot show must not end a command
        # They would print on standard output; the error says it all, and the bot's own log has its own.
        stamina.instrumentation.set_on_retry_hooks(())
        code = 0
        try:
            with (
                _exit_on_errors(as_json="--json" in arguments),
                self.make_context(PROGRAM, arguments) as context,
            ):
                self.invoke(context)
        except typer.Exit as exc:
            code = exc.exit_code
        sys.exit(code)


class PipeClosed(Exception):
    """Nobody reads standard output any more, as after `| head`. No OSError, which would look like the database's."""


class OutputFailed(GuildbookError):
    """Standard output could not be written, so that it cannot take the error either."""


class StandardOutput:
    """Standard output as a binary file. Raises `PipeClosed` if nobody reads it any more."""

    def write(self, data: bytes) -> int:
        """Write bytes."""
        try:
            return sys.stdout.buffer.write(data)
        except BrokenPipeError:
            raise PipeClosed from None  # a cause would be taken for an error of the database's

    def flush(self) -> None:
        """Flush what was written."""
        try:
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise PipeClosed from None  # a cause would be taken for an error of the database's


@contextmanager
def _exit_on_errors(*, as_json: bool = False) -> Iterator[None]:
    """Print an error as one line on standard error, or as JSON on standard output, and exit with its code."""
    try:
        yield
    except PipeClosed:
        _discard(sys.stdout)
        raise typer.Exit(0) from None
    except typer.Exit:
        raise
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED, as_json=as_json)
    except GuildbookError as exc:
        is_wrong = isinstance(exc, SettingsError | ValidationError | NotConfirmed)
        _fail(str(exc), 2 if is_wrong else 1, as_json=as_json and not isinstance(exc, OutputFailed))
    except typer.TyperException as exc:
        context: typer.Context | None = getattr(exc, "ctx", None)
        message = " ".join(exc.format_message().split()).rstrip(".")
        path = PROGRAM if context is None else context.command_path
        _fail(f"{message}; see {path} --help", exc.exit_code, as_json=as_json)
    except OSError as exc:
        if isinstance(exc, BrokenPipeError) and not _has_reader(sys.stdout):  # click's --help
            _discard(sys.stdout)
            raise typer.Exit(0) from None
        file = f"{exc.filename}: " if exc.filename is not None else ""
        _fail(f"{file}{exc.strerror or exc}", 1, as_json=as_json, exc=exc)
    except Exception as exc:
        last = traceback.extract_tb(exc.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        _fail(
            f"unexpected error: {type(exc).__name__}: {exc} ({where}); LOG_LEVEL=DEBUG shows the traceback",
            1, as_json=as_json, exc=exc,
        )  # fmt: skip


def _fail(message: str, code: int, *, as_json: bool, exc: BaseException | None = None) -> NoReturn:
    if exc is not None and os.environ.get("LOG_LEVEL", "").upper() == "DEBUG":
        _print_error("".join(traceback.format_exception(exc)).rstrip())
    if as_json:
        try:
            print_result(json.dumps({"ok": False, "error": redact(message)}, indent=2))
        except OutputFailed:
            _print_error(message)
    else:
        _print_error(message)
    raise typer.Exit(code) from None


def _print_error(text: str) -> None:
    try:
        typer.echo(redact(text), err=True)
    except OSError:
        _discard(sys.stderr)  # nobody reads it


def print_result(text: str) -> None:
    """Print on standard output; nothing if nobody reads it any more. Raises `OutputFailed` if that fails."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as exc:
        _discard(sys.stdout)
        raise OutputFailed(f"the output could not be written: {exc.strerror or exc}") from exc


def _discard(stream: TextIO) -> None:
    """Send a stream nowhere, with what is in its buffer: Python would report at its exit that it cannot be written."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _has_reader(stream: TextIO) -> bool:
    """Return whether somebody may still read what a stream writes: a pipe without a reader is in an error state."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether somebody is at the other end of a stream; None is one that was closed before the start."""
    return stream is not None and not stream.closed and stream.isatty()


def ask(question: str, *, otherwise: str) -> str:
    """Ask on standard error and return the answer.

    Raises `ValidationError` with the message `otherwise` if standard input is not a terminal, and `NotConfirmed` if it
    ends.
    """
    if not is_terminal(sys.stdin):
        raise ValidationError(otherwise)
    typer.echo(f"{question} ", nl=False, err=True)
    answer = sys.stdin.readline()
    if not answer:
        typer.echo("", err=True)
        raise NotConfirmed("not confirmed: nothing was changed")
    return answer.strip()


def confirm(question: str, *, otherwise: str) -> None:
    """Ask a question of yes or no. Raises `NotConfirmed` for any answer but yes, and like `ask`."""
    if ask(f"{question} [y/N]", otherwise=otherwise).lower() not in ("y", "yes"):
        raise NotConfirmed("not confirmed: nothing was changed")


def run_action(
    command: str,
    action: Action,
    *,
    data_dir: Path | None = None,
    as_json: bool = False,
    arguments: Mapping[str, Any] | None = None,
    writes_output: bool = False,
) -> None:
    """Run an action on the database of the settings, print its outcome, record it in the audit log, and exit.

    With `as_json`, standard output is one JSON object: the outcome's data, or `{"ok": false, "error": …}`.

    Parameters
    ----------
    command: the name for `ops.admin_actions`, such as "backup create".
    data_dir: use the embedded server's data there instead.
    arguments: what the audit log records of the command's arguments; no secrets.
    writes_output: the action writes standard output itself, so that its outcome is printed on standard error.
    """
    settings = load_settings().with_data_dir(data_dir)
    with open_progress(as_json) as progress:
        outcome = asyncio.run(_run_recorded(settings, command, action, dict(arguments or {}), progress))
    print_outcome(outcome, as_json=as_json, to_stderr=writes_output)


def print_outcome(outcome: Outcome, *, as_json: bool, to_stderr: bool = False) -> NoReturn:
    """Print an outcome, and exit with its code."""
    if to_stderr:
        _print_error(outcome.text)
    elif as_json:
        print_result(json.dumps({"ok": outcome.ok, **outcome.data}, indent=2, default=str))
    else:
        print_result(redact(outcome.text))
    raise typer.Exit((0 if outcome.ok else 1) if outcome.exit_code is None else outcome.exit_code)


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
    """Return a pool for a command, with the times of the settings."""
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
        except PipeClosed:
            await _record(pool, command, arguments, "Stopped: nobody reads the output any more")
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
        _print_error(f"could not record this in ops.admin_actions: {exc}")


def open_progress(as_json: bool) -> AbstractContextManager[Progress]:
    return nullcontext(ignore_progress) if as_json or not is_terminal(sys.stderr) else _draw_bars()


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
            bars.update(tasks[step.text], completed=step.done, total=step.total, figures=step.figures)

        yield show
