"""`python bot.py doctor`: is everything that the bot needs there, and if not, what is to be done."""

from utils.operations.doctor.report import Check, Finding, State, examined
from utils.operations.doctor.table import CHECKS, examine

__all__ = ["CHECKS", "Check", "Finding", "State", "examine", "examined"]
