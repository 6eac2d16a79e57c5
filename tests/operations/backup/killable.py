"""`python bot.py backup …` which can kill itself before a call of the database; see `helpers.run_backup_command`."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from typing import Any

import asyncpg
import typer

from utils.cli import backup
from utils.cli.common import CommandGroup, RootCommand


def main() -> None:
    """Run the command line; KILL_AT is what `run_backup_command` says."""
    app = typer.Typer(cls=RootCommand, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.add_typer(backup.app, name="backup", cls=CommandGroup)
    kill_at = int(os.environ.get("KILL_AT", "-1"))
    if kill_at >= 0:
        _count_calls(kill_at)
    app()


def _count_calls(kill_at: int) -> None:
    """Kill this process before its n-th database call, or with 0 print their number at the end."""
    calls = 0

    def wrap(name: str) -> None:
        method = getattr(asyncpg.Connection, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return await method(*args, **kwargs)

        setattr(asyncpg.Connection, name, call)

    for name in ("execute", "fetch", "fetchval", "fetchrow", "close"):
        wrap(name)
    atexit.register(lambda: sys.stderr.write(f"\ncalls: {calls}\n"))


if __name__ == "__main__":
    print("started", flush=True)
    main()
