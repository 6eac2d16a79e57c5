"""What operators do with the schema: look, go up, go down, and say where it is. `preview` shows the SQL first."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any

import asyncpg

from utils.database import ConnectTarget, Pool
from utils.exceptions import GuildbookError, MigrationError, translate
from utils.operations import migrations
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.migrations import invalid, schema_catalog, switch
from utils.operations.migrations.preview import aim
from utils.service.lease import hold_as_operator

#: Lines of one kind that are shown; `--json` has all.
SHOWN = 12
#: The name that holds the lease meanwhile, for how many seconds it does, and how often that is renewed.
#: Seconds for a statement that makes or drops a database.
SCRATCH_SECONDS = 60.0

#: Makes a backup and says in a line which one. Raises `GuildbookError`.
Backup = Callable[[], Awaitable[str]]
#: Keeps the bots from acting for as long as it is open. Raises `GuildbookError` when one acts.
Alone = Callable[[Pool], AbstractAsyncContextManager[None]]

_APPLIED, _TAKEN_BACK = "applied", "taken back"
_TOLD = re.compile(rf"^({_APPLIED}|{_TAKEN_BACK}): ([\w, -]+)$", re.MULTILINE)


async def status(database: Pool, *, progress: Progress = ignore_progress) -> Outcome:
    """Say where the schema is, what waits, and what differs from the models; not ok when anything does.

    Raises `MigrationError` for a revision that this version does not know.
    """
    progress(Step("looking at the schema", unit="tables"))
    at, waiting = await migrations.current(database), await migrations.pending(database)
    titles = dict(migrations.revisions())
    off, broken = await switch.is_off(database), await invalid.find(database)
    drift = await migrations.check_drift(database) if not waiting else None
    lines = [f"revision: {at} {titles[at]}" if at else "revision: none, there is no schema yet"]
    if waiting:
        lines.append("waiting (python bot.py db upgrade):")
        lines += _shown([f"{revision} {titles[revision]}" for revision in waiting])
    else:
        lines.append("waiting: nothing")
        lines.append("differs from the models:" if drift else "differs from the models: nothing")
        lines += _shown(drift or [])
    if broken:
        lines.append(f"invalid indexes (the next upgrade drops them): {', '.join(broken)[:300]}")
    if off is not None:
        lines.append(f"AUTO_MIGRATE is off until python bot.py db upgrade: {off}")
    data = {
        "revision": at,
        "pending": [{"revision": revision, "description": titles[revision]} for revision in waiting],
        "drift": drift,
        "invalid_indexes": broken,
        "auto_migrate_off": off,
    }
    return Outcome(_cut(lines), data=data, ok=not (waiting or drift or broken))


async def history(database: Pool, *, progress: Progress = ignore_progress) -> Outcome:
    """List the revisions, oldest first: which are applied, and when, where the books know it. Raises like `status`."""
    progress(Step("reading the books", unit="revisions"))
    waiting = set(await migrations.pending(database))
    when = await _when(database)
    lines, rows = [], []
    for revision, title in migrations.revisions():
        is_applied = revision not in waiting
        at = when.get(revision) if is_applied else None
        told = f" ({at:%Y-%m-%d %H:%M} UTC)" if at is not None else ""
        lines.append(f"{'applied' if is_applied else 'waiting'}  {revision}  {title}{told}")
        rows.append(
            {
                "revision": revision,
                "description": title,
                "applied": is_applied,
                "at": at.isoformat() if at is not None else None,
            }
        )
    if len(lines) > 2 * SHOWN:
        lines = [f"({len(lines) - 2 * SHOWN} older ones)", *lines[-2 * SHOWN :]]
    return Outcome(_cut(lines), data={"revisions": rows})


async def _when(database: Pool) -> dict[str, datetime]:
    """Return when revisions were applied last by an operator; what the bot did by itself is in no book."""
    if await database.fetchval("SELECT to_regclass('ops.admin_actions') IS NULL"):
        return {}
    rows = await database.fetch(
        "SELECT at, result FROM ops.admin_actions WHERE command IN ('db upgrade', 'db downgrade') ORDER BY at, id"
    )
    when: dict[str, datetime] = {}
    for row in rows:
        for verb, names in _TOLD.findall(row["result"]):
            for revision in names.split(", "):
                if verb == _APPLIED:
                    when[revision] = row["at"]
                else:
                    when.pop(revision, None)
    return when


async def upgrade(database: Pool, revision: str | None = None, *, progress: Progress = ignore_progress) -> Outcome:
    """Bring the schema up to a revision, None: the newest; then AUTO_MIGRATE is on again. Raises `MigrationError`."""
    at = await migrations.current(database)
    goal = aim(at, revision, down=False)
    total = len(await migrations.pending(database)) if revision is None else None
    steps = _Steps(progress, "upgrading", total)
    was_off = await switch.is_off(database)
    done = await migrations.upgrade(database, goal, on_applied=steps.one_more)
    lines = [f"{_APPLIED}: {', '.join(done.revisions)}" if done.revisions else "the schema is up to date"]
    if not done.revisions and revision is not None:
        lines = [f"the schema is at {goal} already"]
    if done.invalid.gone:
        lines.append(f"invalid indexes dropped: {', '.join(done.invalid.gone)}")
    lines += [f"the invalid index {name} stays: {why}" for name, why in done.invalid.left]
    off = await switch.is_off(database)
    if was_off is not None:
        lines.append("AUTO_MIGRATE is on again" if off is None else f"AUTO_MIGRATE stays off: {off}")
    elif goal != aim(at, None, down=False):
        lines.append("the next start with AUTO_MIGRATE=true goes on to the newest revision")
    data = {
        "before": done.before,
        "after": goal,
        "applied": list(done.revisions),
        "invalid_indexes_dropped": list(done.invalid.gone),
        "invalid_indexes_left": [name for name, _ in done.invalid.left],
        "auto_migrate_off": off,
    }
    return Outcome(_cut(lines), data=data, ok=not done.invalid.left)


async def downgrade(
    database: Pool,
    revision: str,
    *,
    backup: Backup | None,
    alone: Alone = hold_as_operator,
    progress: Progress = ignore_progress,
) -> Outcome:
    """Take the schema down to a revision (`base`: nothing of ours is left) and switch AUTO_MIGRATE off.

    The backup comes first; `backup` None: there is none, which whoever asks has to mean. What the revisions added is
    gone with everything in it. Raises `GuildbookError` while a bot acts (`alone`), `MigrationError` when it fails:
    the database is at the last revision that was completed, and the switch off unless nothing was done.
    """
    at = await migrations.current(database)
    goal = aim(at, revision, down=True)
    if goal == (at or "base"):
        return Outcome(f"the schema is at {goal} already", data={"before": at, "after": goal, "taken_back": []})
    order = ["base", *(known for known, _ in migrations.revisions())]
    steps = _Steps(progress, "taking the schema down", order.index(at or "base") - order.index(goal))
    told = None
    async with alone(database):
        if backup is not None:
            told = await backup()
        was_off = await switch.is_off(database)
        await switch.turn_off(database, goal)  # before it begins: a start after a kill would go up again
        try:
            done = await migrations.downgrade(database, goal, on_applied=steps.one_more)
        except BaseException:
            if was_off is None and await asyncio.shield(_is_still_at(database, at)):
                await asyncio.shield(switch.turn_on(database))
            raise
    lines = [
        f"{_TAKEN_BACK}: {', '.join(done.revisions)}",
        f"the schema is at {goal}; AUTO_MIGRATE stays off until python bot.py db upgrade",
        f"backup before it: {told}" if told else "no backup was made before it",
    ]
    return Outcome(
        _cut(lines), data={"before": at, "after": goal, "taken_back": list(done.revisions), "backup": told or None}
    )


async def _is_still_at(database: Pool, revision: str | None) -> bool:
    with contextlib.suppress(GuildbookError):
        return await migrations.current(database) == revision
    return False


async def stamp(database: Pool, revision: str, *, progress: Progress = ignore_progress) -> Outcome:
    """Write down that the schema is at a revision, once everything that the revision makes is found to be there.

    It is compared with what the migrations make in an empty database beside it; where we may make none, the newest
    revision is compared with the models alone, and an older one is refused. Raises `MigrationError`.
    """
    known = [name for name, _ in migrations.revisions()]
    goal = known[-1] if revision in ("head", "heads") else revision
    if goal not in known:
        raise MigrationError(f"there is no revision {revision[:40]!r}: choose one of {', '.join(known)}")
    progress(Step("comparing", unit="tables"))
    wrong = await migrations.check_drift(database) if goal == known[-1] else []
    note = "compared with what the migrations make"
    if not wrong:
        found = await schema_catalog.read(database.direct)
        try:
            async with _scratch(database.direct) as empty:
                await migrations.upgrade(empty, goal)
                wanted = await schema_catalog.read(empty)
                await migrations.upgrade(empty)
                newest = await schema_catalog.read(empty)
        except asyncpg.InsufficientPrivilegeError as exc:
            if goal != known[-1]:
                raise MigrationError(
                    f"whether the schema is at {goal} cannot be told: the database user may not make a database to"
                    " compare with: a superuser can give it the right CREATEDB"
                ) from exc
            note = "compared with the models; defaults and checks were not, for want of the right to make a database"
        else:
            wrong = unlike(found, wanted, newest)
    if wrong:
        raise MigrationError(_cut([f"the schema is not what revision {goal} makes; nothing was written:", *wrong]))
    before = await _recorded(database)
    await migrations.stamp(database, goal)
    return Outcome(f"the schema is written down as {goal} (before: {before or 'none'}); {note}",
                   data={"before": before, "after": goal})  # fmt: skip


async def _recorded(database: Pool) -> str | None:
    if await database.fetchval("SELECT to_regclass('alembic_version') IS NULL"):
        return None
    recorded: str | None = await database.fetchval("SELECT version_num FROM alembic_version LIMIT 1")
    return recorded


def unlike(found: dict[str, str], wanted: dict[str, str], newest: dict[str, str]) -> list[str]:
    """Return what contradicts that a catalogue is at a revision; tables that no revision makes are other people's."""
    lines = [f"missing: {name}" for name in sorted(wanted.keys() - found.keys())]
    lines += [f"differs: {name}" for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]]
    ours = {relation for relation in map(_relation, wanted) if relation}
    for name in sorted(found.keys() - wanted.keys()):
        if name in newest or _relation(name) in ours:
            lines.append(f"too much: {name}")
    return lines


def _relation(name: str) -> str | None:
    """Return the relation that a line of the catalogue is about; None for an index, which only names itself."""
    kind, _, rest = name.partition(" ")
    if kind == "column":
        return rest.rpartition(".")[0]
    if kind == "constraint":
        return rest.rpartition(" on ")[2]
    return rest if kind in ("view", "sequence") else None


@contextlib.asynccontextmanager
async def _scratch(target: ConnectTarget) -> AsyncIterator[ConnectTarget]:
    """Lend an empty database on the same server. Raises asyncpg's `InsufficientPrivilegeError`."""
    name = f"guildbook_compare_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(**target.connect_kwargs(), timeout=10, command_timeout=SCRATCH_SECONDS)
    try:
        await connection.execute("CREATE DATABASE " + name + " TEMPLATE template0")
        try:
            yield target.with_database(name)
        finally:
            await connection.execute("DROP DATABASE IF EXISTS " + name + " WITH (FORCE)")
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        if isinstance(exc, asyncpg.InsufficientPrivilegeError):
            raise
        raise translate(exc) or exc from exc
    finally:
        await connection.close(timeout=5)


class _Steps:
    """Counts revisions for whoever wants to know how far it is."""

    def __init__(self, progress: Progress, text: str, total: int | None) -> None:
        self._progress, self._text, self._total, self._done = progress, text, total, 0
        progress(Step(text, 0, total, "revisions"))

    def one_more(self, revision: str) -> None:
        self._done += 1
        self._progress(Step(self._text, self._done, self._total, "revisions"))


def _shown(lines: Sequence[Any]) -> list[str]:
    rest = [f"- and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"- {str(line)[:140]}" for line in lines[:SHOWN]] + rest


def _cut(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    return text if len(text) <= 1_900 else text[:1_890] + "…"
