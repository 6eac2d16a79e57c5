"""Tests of packs over the wire: the real bot, a real PostgreSQL and a simulated Discord, behind one pytest fixture.

`pytest_plugins = ["testing.plugin"]` in a pack's `conftest.py` provides the fixture `bot`.
"""

from testing.people import Message, Person, Reply
from testing.running import RunningBot

__all__ = ["Message", "Person", "Reply", "RunningBot"]
