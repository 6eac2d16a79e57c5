"""`python bot.py doctor`: checks everything that the bot needs, and says what to do."""

from utils.operations.doctor.checks import CHECKS, run_checks, summarize_findings
from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import Check, CheckSkipped, Finding, State

__all__ = ["CHECKS", "Check", "CheckSkipped", "DoctorContext", "Finding", "State", "run_checks", "summarize_findings"]
