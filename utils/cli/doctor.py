"""`python bot.py doctor`: one line for each thing that the bot needs."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import asdict

from utils.cli.common import AsJson, DataDir, print_outcome
from utils.operations.action import Outcome


def doctor(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Check everything that the bot needs, and say what to do; exit code 1 when a check fails."""
    from utils.bot.cog_source import SourceContext
    from utils.bot.loader import cog_paths
    from utils.operations.doctor import run_checks

    logging.disable(logging.CRITICAL)  # the findings say it all
    findings = asyncio.run(run_checks(SourceContext(cog_paths, data_dir=data_dir)))
    checks = [{key: value for key, value in asdict(finding).items() if key != "hangs"} for finding in findings]
    is_ok = all(finding.state != "fail" for finding in findings)
    outcome = Outcome("\n".join(finding.line for finding in findings), {"checks": checks}, ok=is_ok)
    try:
        print_outcome(outcome, as_json=as_json)
    finally:
        if any(finding.hangs for finding in findings):  # a regular exit would wait for what hangs
            os._exit(0 if is_ok else 1)
