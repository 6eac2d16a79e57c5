"""`python bot.py doctor`: one line for each thing that the bot needs."""

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
    """Check everything that the bot needs, and say what to do; exit code 1 when a check fails."""
    from utils.operations.doctor import DoctorContext, run_checks

    logging.disable(logging.CRITICAL)  # the findings say it all
    try:
        findings = asyncio.run(run_checks(DoctorContext(data_dir=data_dir)))
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    is_ok = all(finding.state != "fail" for finding in findings)
    if as_json:
        checks = [{key: value for key, value in asdict(finding).items() if key != "hangs"} for finding in findings]
        typer.echo(json.dumps({"ok": is_ok, "checks": checks}, indent=2))
    else:
        for finding in findings:
            typer.echo(finding.line)
    code = 0 if is_ok else 1
    if any(finding.hangs for finding in findings):  # a regular exit would wait for what hangs
        sys.stdout.flush()
        os._exit(code)
    raise typer.Exit(code)
