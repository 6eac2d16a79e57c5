"""`python bot.py export …`: exports documents and tables as JSON, JSON lines or CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from utils.cli.common import AsJson, DataDir, StandardOutput, parse_path, run_action
from utils.database import Pool
from utils.exceptions import ValidationError
from utils.operations.action import Outcome, Progress
from utils.settings import Settings

app = typer.Typer(help="Write documents or a table to a file.", subcommand_metavar="")


@app.callback(invoke_without_command=True, context_settings={"allow_interspersed_args": True})
def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="NAMESPACE|TABLE",
            help="members, users, emojis or shop (as imported), a table (table:members if both exist), or a namespace.",
        ),
    ],
    to: Annotated[
        Path | None, typer.Option(parser=parse_path, metavar="PATH", help="File to replace; default: standard output.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="json, jsonl or csv.")] = "json",
    guild: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Export only this guild; 0: without a guild.")
    ] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Export documents or a table from one snapshot."""
    arguments = {"what": what, "to": str(to) if to else None, "format": form, "guild_id": guild}

    async def work(_: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.importing import exporting

        where = StandardOutput() if to is None else to
        return await exporting.export(pool, what, where, form=_form(form), guild_id=guild, progress=progress)

    if as_json and to is None:
        raise ValidationError("--json needs --to FILE: standard output already receives the export")
    run_action("export", work, data_dir=data_dir, as_json=as_json, arguments=arguments, writes_output=to is None)


def _form(text: str) -> Any:
    return text.lower()
