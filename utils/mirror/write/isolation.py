"""Batches that the database refuses: the bad row becomes a dead letter, everything beside it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from utils.database import Pool
from utils.exceptions import DatabaseError
from utils.mirror.records.rows import Absence, Entry, Group, Key, Observation
from utils.mirror.spool.queue import EventQueue
from utils.mirror.write.apply import Batch, Told, Written, apply
from utils.mirror.write.buffer import Buffer
from utils.mirror.write.dead_letters import bury_record, bury_row, is_about_rows, isolate
from utils.mirror.write.told import write_told
from utils.service.lease import Fence

Slot = tuple[str, Key]


class Writer(Protocol):
    """What isolating needs of the writer."""

    @property
    def database(self) -> Pool: ...
    @property
    def fence(self) -> Fence: ...
    @property
    def buffer(self) -> Buffer: ...
    @property
    def queue(self) -> EventQueue: ...
    @property
    def writing(self) -> asyncio.Lock: ...
    @property
    def users_writing(self) -> asyncio.Lock: ...

    async def told(self) -> Told | None: ...
    def count(self, written: Written) -> None: ...
    def end(self, observation: Observation, error: Exception | None) -> None: ...
    def older_than_live(self, observation: Observation) -> Iterator[Group]: ...
    def sparing_live(self, observation: Observation) -> list[Absence]: ...


async def write_isolated(writer: Writer, observations: list[Observation]) -> None:
    """Write what waits and these observations, which leave the list as they are done with, around the bad rows.

    Raises `DatabaseError` when no row is at fault; what is not written waits again then.
    """
    async with writer.writing:
        await _events(writer)
        await _rows(writer)
    while observations:
        error: DatabaseError | None = None
        async with writer.writing:
            try:
                await _observation(writer, observations[0])
            except DatabaseError as refused:
                if not is_about_rows(refused):
                    raise
                error = refused
        writer.end(observations.pop(0), error)


async def _events(writer: Writer) -> None:
    newest = writer.queue.last
    while (told := await writer.told()) is not None:
        writer.count(Written(events=await write_told(writer.database, writer.fence, told)))
        await writer.queue.discard(told.upto)
        if told.upto >= newest:
            return


async def _rows(writer: Writer) -> None:
    left = writer.buffer.take()

    async def write(part: Sequence[tuple[Slot, Entry]]) -> None:
        await _apply(writer, Batch(entries=dict(part)))
        for slot, _ in part:
            del left[slot]

    async def bury(piece: tuple[Slot, Entry], error: Exception) -> None:
        async with writer.database.transaction() as connection:
            await writer.fence.check(connection)
            await bury_row(connection, *piece, error)
        del left[piece[0]]

    try:
        await isolate(list(left.items()), write, bury)
    finally:
        writer.buffer.give_back(left)


async def _observation(writer: Writer, observation: Observation) -> None:
    """Write an observation's rows around the bad ones, then what it proves."""

    async def write(part: Sequence[tuple[Group, tuple[Any, ...]]]) -> None:
        await _apply(writer, Batch(groups=list(_regrouped(part))))

    async def bury(piece: tuple[Group, tuple[Any, ...]], error: Exception) -> None:
        async with writer.database.transaction() as connection:
            await writer.fence.check(connection)
            await bury_record(connection, *piece, error)

    groups = list(writer.older_than_live(observation))
    await isolate([(group, record) for group in groups for record in group.records], write, bury)
    proof = Batch(absences=writer.sparing_live(observation))
    if observation.run is not None:
        proof.runs.append(observation.run)
    if observation.ready is not None:
        proof.ready.append((*observation.ready, observation.stamp))
    await _apply(writer, proof)


async def _apply(writer: Writer, batch: Batch) -> None:
    writer.count(await apply(writer.database, batch, writer.fence, writer.users_writing))


def _regrouped(pieces: Iterable[tuple[Group, tuple[Any, ...]]]) -> Iterator[Group]:
    """Put records back into groups like those they came from."""
    last: Group | None = None
    regrouped: Group | None = None
    for group, record in pieces:
        if group is not last or regrouped is None:
            if regrouped is not None:
                yield regrouped
            last, regrouped = group, Group(group.table, group.columns, group.mode)
        regrouped.records.append(record)
    if regrouped is not None:
        yield regrouped
