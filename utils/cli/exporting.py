"""`python bot.py export …`: documents and tables as JSON, JSON lines or CSV."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from utils.cli.common import AsJson, DataDir, exit_on_errors, run_action, run_with_pool
from utils.database import Pool
from utils.exceptions import ValidationError
from utils.operations.action import Outcome, Progress, record_action
from utils.settings import Settings, load_settings

app = typer.Typer(help="Write documents or a table to a file.", subcommand_metavar="")


@app.callback(invoke_without_command=True, context_settings={"allow_interspersed_args": True})
def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="NAMESPACE|TABLE",
            help="members, users, emojis or shop as imported; a table, table:members where both are; or a namespace.",
        ),
    ],
    to: Annotated[Path | None, typer.Option(help="The file, replaced as a whole; standard output without it.")] = None,
    form: Annotated[str, typer.Option("--format", help="json, jsonl or csv.")] = "json",
    guild: Annotated[int | None, typer.Option(help="Of this guild only; 0: of none.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Export documents or a table, as they are at one moment."""
    arguments = {"what": what, "to": str(to) if to else None, "format": form, "guild_id": guild}

    async def work(_: Settings, database: Pool, progress: Progress) -> Outcome:
        from utils.operations.importing import exporting

        assert to is not None, "standard output goes another way"
        return await exporting.export(database, what, to, form=_form(form), guild_id=guild, progress=progress)

    async def pour(database: Pool) -> Outcome:
        from utils.operations.importing import exporting

        outcome = await exporting.export(database, what, sys.stdout.buffer, form=_form(form), guild_id=guild)
        await record_action(database, "export", arguments, outcome.text)
        return outcome

    if to is not None:
        run_action("export", work, data_dir=data_dir, as_json=as_json, arguments=arguments)
    with exit_on_errors(as_json=as_json):  # what is exported is all that may stand on standard output
        if as_json:
            raise ValidationError("--json needs --to FILE: standard output already receives the export")
        outcome = run_with_pool(load_settings(), data_dir, pour)
        typer.echo(outcome.text, err=True)


def _form(text: str) -> Any:
    return text.lower()
