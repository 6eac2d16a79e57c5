"""`python bot.py doctor`: one line for each thing that has to be right."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from dataclasses import asdict

import typer

from utils.cli.common import INTERRUPTED, AsJson, DataDir


def doctor(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Look whether everything that the bot needs is there, and say what to do; exit code 1 when something fails."""
    from utils.operations.doctor import examine
    from utils.operations.doctor.context import DoctorContext

    logging.disable(logging.CRITICAL)  # what they would say is among the findings
    try:
        found = asyncio.run(examine(DoctorContext(data_dir=data_dir)))
    except KeyboardInterrupt:
        typer.echo("called off", err=True)
        raise typer.Exit(INTERRUPTED) from None
    is_well = all(finding.state != "fail" for finding in found)
    if as_json:
        checks = [{key: value for key, value in asdict(finding).items() if key != "hangs"} for finding in found]
        typer.echo(json.dumps({"ok": is_well, "checks": checks}, indent=2))
    else:
        for finding in found:
            typer.echo(finding.line)
    code = 0 if is_well else 1
    if any(finding.hangs for finding in found):  # the end of the process would wait for whatever hangs
        sys.stdout.flush()
        os._exit(code)
    raise typer.Exit(code)
