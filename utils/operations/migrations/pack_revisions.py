"""The revisions of packs: what a database has of each, bringing them up to date, and dropping what a pack left.

Each pack has a version table of its own and is migrated after Guildbook, one after the other: what fails in one keeps
that pack from being loaded, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection

from utils import packs
from utils.database import ConnectTarget, Pool, recorded_packs
from utils.database.placement import Placement
from utils.database.recorded_packs import RecordedPack
from utils.exceptions import MigrationError, UnknownRevision, translate_errors
from utils.operations.action import Outcome
from utils.operations.migrations import runner
from utils.operations.migrations.dependents import refuse_dependents_of
from utils.operations.migrations.drift import check_drift
from utils.operations.migrations.environment import DEFAULTS, MigrationOptions, find_missing_base
from utils.operations.migrations.history import BOT, Actor
from utils.operations.migrations.revisions import UPGRADE, Revisions
from utils.operations.migrations.runner import Backup
from utils.packs import Pack
from utils.service.lease import hold_as_operator
from utils.text import format_count

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackState:
    """What a database has of a pack."""

    name: str
    #: Whether `COGS` names it.
    is_active: bool
    #: The revisions that the database is at; none before the first upgrade, and for a pack without tables.
    revisions: tuple[str, ...] = ()
    #: Revisions that the next upgrade applies, oldest first.
    pending: tuple[str, ...] = ()
    #: Differences between its models and its tables, one line each.
    drift: tuple[str, ...] = ()
    #: Why it cannot be used, in one line; None: it can.
    problem: str | None = None
    #: Its tables and views in the database.
    relations: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether there is nothing to do about it. A pack that was removed and left its tables is fine."""
        return self.problem is None and not self.pending and not self.drift

    def line(self) -> str:
        """Return its state for people, in one line."""
        if not self.is_active:
            return (
                f"pack {self.name}: not in COGS; {format_count(len(self.relations), 'table')} kept"
                f" ({', '.join(self.relations) or 'none'}); python bot.py pack drop {self.name} removes them"
            )
        parts = [f"revision {', '.join(self.revisions) or 'none'}"]
        if self.pending:
            parts.append(f"pending ({UPGRADE}): {', '.join(self.pending)}")
        if self.drift:
            parts.append(f"drift from its models: {'; '.join(self.drift)[:300]}")
        if self.problem is not None:
            parts = [self.problem.removeprefix(f"pack {self.name}: ")]
        return f"pack {self.name}: {'; '.join(parts)}"


async def pack_states(database: Pool | ConnectTarget, *, options: MigrationOptions = DEFAULTS) -> list[PackState]:
    """Return the state of every active pack, then of those that are gone and left tables. Changes nothing."""
    recorded = {pack.name: pack for pack in await runner.read_schema(database, recorded_packs.read_packs)}
    states = [await _state_of(database, pack, recorded.pop(pack.name, None), options) for pack in packs.active()]
    gone = [pack for pack in recorded.values() if _has_any(pack)]
    return states + [PackState(pack.name, False, pack.revisions, relations=_spelled(pack)) for pack in gone]


async def _state_of(
    database: Pool | ConnectTarget, pack: Pack, recorded: RecordedPack | None, options: MigrationOptions
) -> PackState:
    relations = () if recorded is None else _spelled(recorded)
    revisions = () if recorded is None else recorded.revisions
    own = options.of_pack(pack)
    try:
        missing = find_missing_base(pack, Revisions(options.scripts))
        if missing is not None:
            return PackState(pack.name, True, revisions, problem=missing, relations=relations)
        known = Revisions(own.scripts)
        revisions = await runner.current_heads(database, options=own)
        pending = known.pending(revisions)
        problem = known.merge_advice() if known.needs_merge(revisions) else packs.problem(pack)
        problem = await runner.find_obstacle(database, options=own) or problem
        drift = () if pending or problem else tuple(await check_drift(database, scripts=own.scripts))
    except MigrationError as exc:
        return PackState(pack.name, True, revisions, problem=str(exc), relations=relations)
    return PackState(pack.name, True, revisions, tuple(pending), drift, problem, relations)


async def prepare_packs(
    pool: Pool, *, auto_migrate: bool, backup: Backup | None = None, options: MigrationOptions = DEFAULTS
) -> None:
    """Bring the tables of every active pack up to date at a start, if the settings and the database allow it.

    A pack for which that fails is not loaded, and the reason is logged in one line. Raises `DatabaseUnavailable`.
    """
    paused = await runner.find_pause(pool)
    for pack in packs.active():
        packs.clear_problem(pack)
        try:
            await _prepare(pool, pack, auto_migrate and paused is None, backup, options)
        except MigrationError as exc:
            packs.report_problem(pack, str(exc))
            _log.error("pack not loaded: %s", exc)


async def _prepare(pool: Pool, pack: Pack, may_migrate: bool, backup: Backup | None, options: MigrationOptions) -> None:
    own = options.of_pack(pack)
    if (missing := find_missing_base(pack, Revisions(options.scripts))) is not None:
        raise MigrationError(missing)
    if may_migrate:
        await _upgrade(pool, own, backup, BOT, None)
        return
    if obstacle := await runner.find_obstacle(pool, options=own):
        raise MigrationError(obstacle)
    if pending := await runner.pending(pool, options=own):
        raise MigrationError(
            f"pack {pack.name} lacks revision {', '.join(pending)}, and AUTO_MIGRATE is off or paused; run {UPGRADE}"
        )


async def upgrade_packs(
    database: Pool | ConnectTarget,
    *,
    backup: Backup | None = None,
    by: Actor = BOT,
    on_applied: Callable[[str], None] | None = None,
    options: MigrationOptions = DEFAULTS,
) -> tuple[list[str], list[str]]:
    """Apply the pending revisions of every active pack.

    Returns the applied revisions, and one line for each pack for which that failed; the others are upgraded all the
    same. `backup` makes the backup that comes before revisions which destroy rows. Raises `DatabaseUnavailable`.
    """
    applied: list[str] = []
    problems: list[str] = []
    for pack in packs.active():
        try:
            applied += await _upgrade(database, options.of_pack(pack), backup, by, on_applied)
            packs.clear_problem(pack)
        except MigrationError as exc:
            problems.append(str(exc))
    return applied, problems


async def _upgrade(
    database: Pool | ConnectTarget,
    options: MigrationOptions,
    backup: Backup | None,
    by: Actor,
    on_applied: Callable[[str], None] | None,
) -> Sequence[str]:
    revisions = Revisions(options.scripts)
    if not revisions.ids:
        return ()
    if backup is not None and isinstance(database, Pool):
        await runner.back_up_losses(database, await runner.find_losses(database, options=options), backup)
    return (await runner.upgrade(database, by=by, on_applied=on_applied, options=options)).revisions


async def refuse_missing_base(database: Pool | ConnectTarget, reverted: Sequence[str]) -> None:
    """Raise `MigrationError` if reverting revisions of Guildbook takes away one that a pack with tables needs."""
    for pack in await runner.read_schema(database, recorded_packs.read_packs):
        if pack.revisions and pack.requires in reverted:
            raise MigrationError(
                f"pack {pack.name} needs revision {pack.requires} of Guildbook, which this would revert. Nothing was"
                f" changed: remove the pack's tables first, with python bot.py pack drop {pack.name}, or use a version"
                " of the pack that needs less"
            )


async def _find_recorded(pool: Pool, name: str) -> RecordedPack:
    """Return the pack of a name of which a database has tables. Raises `UnknownRevision` if it has none."""
    recorded = {pack.name: pack for pack in await recorded_packs.fetch_packs(pool) if _has_any(pack)}
    if name not in recorded:
        known = ", ".join(recorded) or "(no pack)"
        raise UnknownRevision(f"the database has no tables of a pack {name[:50]!r}: expected one of {known}")
    return recorded[name]


async def drop_pack(pool: Pool, name: str, *, backup: Backup | None) -> Outcome:
    """Drop the tables and views of a pack, after a backup, while no bot acts on the database.

    `backup` makes that backup; None for none. Raises `MigrationError` if another program's objects depend on them, or
    the pack is still in `COGS`; `GuildbookError` if a bot acts, or the backup failed. Then nothing was changed.
    """
    pack = await _find_recorded(pool, name)
    if pack.is_active:
        raise MigrationError(
            f"pack {name} is in COGS, so that the next start would create its tables again: remove it there first"
        )
    await refuse_dependents_of(pool, pack.names())
    async with hold_as_operator(pool):
        saved = None if backup is None else await runner.back_up_first(backup)
        await runner.read_schema(pool, partial(_drop, pack, pool.placement))
    dropped = sorted(_spelled(pack))
    _log.warning("dropped the tables of pack %s: %s", name, ", ".join(dropped))
    return Outcome(
        f"dropped: {', '.join([*dropped, pack.version_table])}\n"
        + (f"backup made before: {saved}" if saved else "no backup was made before"),
        data={"pack": name, "dropped": dropped, "backup": saved},
    )


def _drop(pack: RecordedPack, placement: Placement, connection: Connection) -> None:
    """Drop what a pack made, in one transaction."""
    kinds = {"v": "VIEW", "m": "MATERIALIZED VIEW"}
    names = [(placement.resolve(schema), name) for schema, name in pack.names()]
    found = connection.exec_driver_sql(_KINDS, ([schema for schema, _ in names], [name for _, name in names]))
    rows = sorted(found.all(), key=lambda row: row.kind not in kinds)  # views first: they depend on tables
    with translate_errors(f"dropping the tables of pack {pack.name}"):
        tables = [row for row in rows if row.kind not in kinds]
        for row in rows:
            if row.kind in kinds:
                connection.exec_driver_sql(" ".join(("DROP", kinds[row.kind], "IF EXISTS", row.name)))
        if tables:
            connection.exec_driver_sql(" ".join(("DROP TABLE", ", ".join(row.name for row in tables))))
        connection.commit()


_KINDS = """
SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name, c.relkind::text AS kind
FROM unnest($1::text[], $2::text[]) AS wanted (schema, name)
    JOIN pg_namespace AS n ON n.nspname = wanted.schema
    JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = wanted.name
WHERE c.relkind IN ('r', 'p', 'v', 'm')
"""


def _spelled(pack: RecordedPack) -> tuple[str, ...]:
    return tuple(name if schema is None else f"{schema}.{name}" for schema, name in pack.relations)


def _has_any(pack: RecordedPack) -> bool:
    return bool(pack.revisions or pack.relations)
