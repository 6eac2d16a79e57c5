"""What Discord showed of one guild at one moment, on its way into the database."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from utils.mirror.apply import Run
from utils.mirror.rows import Absence, Group
from utils.mirror.touched import PEOPLE


@dataclass(eq=False, slots=True)
class Observation:
    """What Discord showed of one guild at one moment: rows, and what is gone if it is not among them."""

    guild_id: int
    stamp: int
    groups: list[Group]
    absences: list[Absence] = field(default_factory=list)
    run: Run | None = None
    #: Guilds that the bot is in, by READY: (shard id, number of shards, ids).
    ready: tuple[int, int, set[int]] | None = None
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def size(self) -> int:
        """Records in it."""
        return sum(len(group.records) for group in self.groups)

    @property
    def shows_people(self) -> bool:
        """Whether it shows members or users."""
        tables = {group.table for group in self.groups} | {absence.table for absence in self.absences}
        return not PEOPLE.isdisjoint(tables)
