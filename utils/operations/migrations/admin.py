"""What operators do with the schema: status, history, upgrade, downgrade and stamp."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import asyncpg

from utils import packs
from utils.database import ConnectTarget, Pool, ownership
from utils.database.locks import describe_lock_holders
from utils.database.placement import Placement
from utils.database.sessions import connect
from utils.exceptions import GuildbookError, MigrationError, UnknownRevision
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.migrations import invalid_indexes, runner, schema_catalog
from utils.operations.migrations.dependents import refuse_dependents
from utils.operations.migrations.drift import check_drift
from utils.operations.migrations.environment import DEFAULTS, MigrationOptions
from utils.operations.migrations.history import COMMAND_LINE, Actor, AppliedRevision
from utils.operations.migrations.pack_revisions import pack_states, refuse_missing_base, upgrade_packs
from utils.operations.migrations.preview import preview
from utils.operations.migrations.revisions import Revisions
from utils.operations.migrations.runner import Backup
from utils.service.lease import hold_as_operator
from utils.text import format_count

#: Lines of one kind that are shown; `--json` has all.
SHOWN = 12
#: Most characters of an outcome's text: a Discord message takes 2,000.
TEXT_LENGTH = 1_900

#: Keeps bots from acting while it is open. Raises `GuildbookError` when one acts.
Exclusive = Callable[[Pool], AbstractAsyncContextManager[None]]


async def status(pool: Pool, *, progress: Progress = ignore_progress, options: MigrationOptions = DEFAULTS) -> Outcome:
    """Report the current revision, pending ones, drift and invalid indexes; not ok when there are any of these.

    Neither is a database that has another program's tables, or a part of ours; nor branches that need a merge. Drift is
    only looked for at the newest revision. Raises `MigrationError` for a revision that this version does not know.
    """
    progress(Step("reading the schema", unit="tables"))
    revisions = Revisions(options.scripts)
    heads = await runner.current_heads(pool, options=options)
    current, pending = ", ".join(heads) or None, revisions.pending(heads)
    obstacle = await runner.find_obstacle(pool, options=options)
    descriptions = dict(revisions.known)
    paused, invalid = await runner.find_pause(pool), await invalid_indexes.find(pool)
    drift = await check_drift(pool, scripts=options.scripts) if not pending else None
    states = [] if revisions.pack is not None else await pack_states(pool, options=options)
    lines = [f"revision: {head} {descriptions[head]}" for head in heads]
    if pool.placement != Placement():
        lines.insert(0, f"schemas: {pool.placement.main}, {pool.placement.ops}")
    if obstacle is not None:
        lines.append(f"problem: {obstacle}")
    elif not heads:
        lines.append("revision: none, the database has no schema")
    if len(revisions.newest(heads)) < len(heads):
        lines.append("some of these build on others: the next upgrade removes the latter from the version table")
    if revisions.needs_merge(heads):
        lines.append(f"merge needed: {revisions.merge_advice()}")
    if pending:
        lines.append("pending (python bot.py db upgrade):")
        lines += _shorten([f"{revision} {descriptions[revision]}" for revision in pending])
    else:
        lines.append("pending: none")
        lines.append("drift from the models:" if drift else "drift from the models: none")
        lines += _shorten(drift or [])
    if invalid:
        lines.append(f"invalid indexes (the next upgrade drops them): {', '.join(invalid)[:300]}")
    lines += [state.line() for state in states]
    if paused is not None:
        lines.append(f"AUTO_MIGRATE is paused until python bot.py db upgrade: {paused}")
    data = {
        "schemas": pool.placement.schemas(),
        "revision": current,
        "revisions": list(heads),
        "heads": list(revisions.heads),
        "merge": revisions.merge_line() if revisions.needs_merge(heads) else None,
        "problem": obstacle,
        "pending": [{"revision": revision, "description": descriptions[revision]} for revision in pending],
        "drift": drift,
        "invalid_indexes": invalid,
        "auto_migrate_off": None if paused is None else str(paused),
        "packs": [asdict(state) for state in states],
    }
    is_ok = not (pending or drift or invalid or obstacle) and all(state.is_ok for state in states)
    return Outcome(_join(lines), data=data, ok=is_ok)


def _format_time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


async def history(
    pool: Pool,
    *,
    progress: Progress = ignore_progress,
    format_time: Callable[[datetime], str] = _format_time,
    name_user: Callable[[int], str] = "user {}".format,
    options: MigrationOptions = DEFAULTS,
) -> Outcome:
    """List the revisions, oldest first: whether each is applied, and when and by whom as far as `ops.migrations` knows.

    Those of packs come after Guildbook's. `format_time` and `name_user` return how times and users are shown. Raises
    like `status`.
    """
    progress(Step("reading ops.migrations", unit="revisions"))
    applied = await runner.applied(pool)
    rows, problems = await _history_of(pool, applied, options)
    for pack in packs.active() if packs.pack_of_scripts(options.scripts) is None else ():
        try:
            more, wrong = await _history_of(pool, applied, options.of_pack(pack))
        except MigrationError as exc:
            more, wrong = [], [str(exc)]
        rows, problems = rows + more, problems + wrong
    lines = []
    for row in rows:
        state, record = "applied" if row["applied"] else "pending", applied.get(row["revision"])
        when = _when(record if row["applied"] else None, format_time, name_user)
        lines.append(f"{state}  {row['revision']}  {row['description']}{when}")
    if len(lines) > 2 * SHOWN:
        lines = [f"({format_count(len(lines) - 2 * SHOWN, 'older revision')})", *lines[-2 * SHOWN :]]
    return Outcome(_join([*lines, *problems]), data={"revisions": rows})


async def _history_of(
    pool: Pool, applied: Mapping[str, AppliedRevision], options: MigrationOptions
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the revisions of Guildbook or of a pack, and what keeps some from being applied."""
    revisions = Revisions(options.scripts)
    heads = await runner.current_heads(pool, options=options)
    pending = set(revisions.pending(heads))
    rows = []
    for revision, description in revisions.known:
        record = applied.get(revision) if revision not in pending else None
        rows.append(
            {
                "revision": revision,
                "description": description,
                "pack": None if revisions.pack is None else revisions.pack.name,
                "applied": revision not in pending,
                "at": None if record is None else record.at.isoformat(),
                "by": None if record is None else record.by.kind,
                "user_id": None if record is None else record.by.user_id,
                "seconds": None if record is None else record.seconds,
            }
        )
    return rows, [f"merge needed: {revisions.merge_advice()}"] if revisions.needs_merge(heads) else []


def _when(
    record: AppliedRevision | None, format_time: Callable[[datetime], str], name_user: Callable[[int], str]
) -> str:
    if record is None:
        return ""
    by = record.by.kind if record.by.user_id is None else name_user(record.by.user_id)
    return f" ({format_time(record.at)}, by {by})"


async def plan_upgrade(
    pool: Pool, *, progress: Progress = ignore_progress, options: MigrationOptions = DEFAULTS
) -> Outcome | None:
    """Return what an upgrade to the newest revision would do, with the SQL as its file; None: it has nothing to do.

    Raises `MigrationError` where a merge is needed, and for a database that must not be migrated.
    """
    if obstacle := await runner.find_obstacle(pool, options=options):
        raise MigrationError(obstacle)
    migration = await preview(pool, progress=progress, options=options)
    invalid, paused = await invalid_indexes.find(pool), await runner.find_pause(pool)
    lines = [migration.text] if migration.data["statements"] else []
    if invalid:
        lines.append(f"invalid indexes to drop: {', '.join(invalid)[:300]}")
    if paused is not None:
        lines.append(f"AUTO_MIGRATE is resumed, which is paused: {paused}")
    lines += [state.line() for state in await pack_states(pool, options=options) if state.pending]
    return replace(migration, text=_join(lines)) if lines else None


async def upgrade(
    pool: Pool,
    revision: str | None = None,
    *,
    backup: Backup | None = None,
    by: Actor = COMMAND_LINE,
    progress: Progress = ignore_progress,
    options: MigrationOptions = DEFAULTS,
) -> Outcome:
    """Upgrade the schema to a revision. The newest (`revision` None) ends a pause of AUTO_MIGRATE.

    `revision`: also `heads` (all branches, unmerged), a branch label, or `label@head`. `backup` makes the backup that
    comes before revisions which destroy rows; None for no backup. Raises `MigrationError`, also if that fails.
    """
    revisions = Revisions(options.scripts)
    current = await runner.current_heads(pool, options=options)
    goal = revisions.resolve(current, revision)
    total = len(revisions.pending(current)) if goal == "heads" or revision is None else None
    losses = await runner.find_losses(pool, goal, options=options)
    saved = None if backup is None else await runner.back_up_losses(pool, losses, backup)
    steps = _StepCounter(progress, "upgrading", total)
    was_paused = await runner.find_pause(pool) is not None
    result = await runner.upgrade(pool, goal, by=by, on_applied=steps.count, options=options)
    if result.revisions:
        lines = [f"applied: {', '.join(result.revisions)}"]
    else:
        lines = ["the schema is up to date" if revision is None else f"the schema is at {goal} already: nothing to do"]
    if losses and result.revisions:
        lines.append(f"backup made before: {saved}" if saved else "no backup was made before")
    of_packs: list[str] = []
    problems: list[str] = []
    if revision is None and revisions.pack is None:
        of_packs, problems = await upgrade_packs(pool, backup=backup, by=by, options=options)
        lines += [f"applied to packs: {', '.join(of_packs)}"] if of_packs else []
        lines += problems
    if result.indexes.dropped:
        lines.append(f"invalid indexes dropped: {', '.join(result.indexes.dropped)}")
    lines += [
        f"invalid index {name} could not be dropped: {error}{await describe_lock_holders(pool.direct, [name])}"
        for name, error in result.indexes.remaining
    ]
    paused = await runner.find_pause(pool)
    if was_paused:
        lines.append("AUTO_MIGRATE is resumed" if paused is None else f"AUTO_MIGRATE stays paused: {paused}")
    elif revisions.pending(await runner.current_heads(pool, options=options)):
        lines.append("the next start with AUTO_MIGRATE=true upgrades to the newest revision")
    data = {
        "before": result.before,
        "after": goal,
        "applied": [*result.revisions, *of_packs],
        "problems": problems,
        "backup": saved,
        "invalid_indexes_dropped": list(result.indexes.dropped),
        "invalid_indexes_left": [name for name, _ in result.indexes.remaining],
        "auto_migrate_off": None if paused is None else str(paused),
    }
    return Outcome(_join(lines), data=data, ok=not result.indexes.remaining and not problems)


async def plan_downgrade(
    pool: Pool, revision: str, *, progress: Progress = ignore_progress, options: MigrationOptions = DEFAULTS
) -> Outcome | None:
    """Return what a downgrade would do, with the SQL as its file; None: the schema is there already.

    Raises `MigrationError` for an unknown or later revision, and if objects of other programs depend on what goes.
    """
    revisions = Revisions(options.scripts)
    heads = await runner.current_heads(pool, options=options)
    reverted = revisions.to_revert(heads, revisions.resolve(heads, revision, down=True))
    if not reverted:
        return None
    await refuse_dependents(pool, reverted, options)
    if revisions.pack is None:
        await refuse_missing_base(pool, reverted)
    return await preview(pool, revision, down=True, progress=progress, options=options)


async def downgrade(
    pool: Pool,
    revision: str,
    *,
    backup: Backup | None,
    exclusive: Exclusive = hold_as_operator,
    by: Actor = COMMAND_LINE,
    progress: Progress = ignore_progress,
    options: MigrationOptions = DEFAULTS,
) -> Outcome:
    """Downgrade the schema to a revision (`base` removes everything of ours) and pause AUTO_MIGRATE.

    All data in what the reverted revisions added is lost.

    Parameters
    ----------
    backup: makes the backup that comes first; None for no backup.
    exclusive: keeps bots from acting during the downgrade.

    Raises
    ------
    GuildbookError: a bot acts on the database, or the backup failed. Nothing was changed.
    MigrationError: objects of another program depend on tables that it would drop. Nothing was changed.
    MigrationError: a revision failed. The database is at the last completed revision, and AUTO_MIGRATE is paused unless
        nothing was reverted.
    """
    revisions = Revisions(options.scripts)
    heads = await runner.current_heads(pool, options=options)
    current, goal = ", ".join(heads) or None, revisions.resolve(heads, revision, down=True)
    reverted = revisions.to_revert(heads, goal)
    if not reverted:
        return Outcome(
            f"the schema is at {goal} already: nothing to do", data={"before": current, "after": goal, "taken_back": []}
        )
    await refuse_dependents(pool, reverted, options)
    if revisions.pack is None:
        await refuse_missing_base(pool, reverted)
    steps = _StepCounter(progress, "downgrading", len(reverted))
    saved = None
    async with exclusive(pool):
        if backup is not None:
            saved = await runner.back_up_first(backup)
        was_paused = await runner.find_pause(pool) is not None
        # Before the first step: if this process is killed, the next start must not upgrade again.
        await runner.pause_auto_migrate(pool, goal, by=by, options=options)
        try:
            result = await runner.downgrade(pool, goal, by=by, on_applied=steps.count, options=options)
        except BaseException:
            if not was_paused and await asyncio.shield(_is_still_at(pool, current, options)):
                await asyncio.shield(runner.resume_auto_migrate(pool, by=by))
            raise
    lines = [
        f"reverted: {', '.join(result.revisions)}",
        f"the schema is at {goal}; AUTO_MIGRATE is paused until python bot.py db upgrade",
        f"backup made before: {saved}" if saved else "no backup was made before",
    ]
    return Outcome(
        _join(lines),
        data={"before": current, "after": goal, "taken_back": list(result.revisions), "backup": saved or None},
    )


async def _is_still_at(pool: Pool, revision: str | None, options: MigrationOptions) -> bool:
    with contextlib.suppress(GuildbookError):
        return await runner.current(pool, options=options) == revision
    return False


@dataclass(frozen=True, slots=True)
class CheckedStamp:
    """A revision that the schema was found to be at, and that can be recorded."""

    goal: str
    #: What is recorded now; None if nothing is.
    before: str | None
    #: What was compared.
    note: str
    #: Whether it is recorded already.
    is_recorded: bool

    @property
    def line(self) -> str:
        """The result of the comparison, for people."""
        return f"the schema is what revision {self.goal} makes ({self.note}); recorded is {self.before or 'none'}"


async def check_stamp(
    pool: Pool, revision: str, *, progress: Progress = ignore_progress, options: MigrationOptions = DEFAULTS
) -> CheckedStamp:
    """Compare the schema with what a revision makes in an empty database. Changes nothing.

    Without the right to create one, the newest revision is compared with the models instead. Raises `MigrationError`
    for differences, and for an older revision without that right.
    """
    revisions = Revisions(options.scripts)
    if revision == "head" and len(revisions.heads) > 1:
        raise MigrationError(
            f"there are {len(revisions.heads)} newest revisions: choose {' or '.join(revisions.heads)},"
            " or heads for all"
        )
    goal = revisions.resolve((), revision)
    if goal == "base":
        raise UnknownRevision(
            f"there is no revision {revision[:40]!r} to record: choose one of {', '.join(revisions.ids)}"
        )
    is_newest = goal == "heads" or revisions.heads == (goal,)
    progress(Step("comparing", unit="tables"))
    differences = await check_drift(pool, scripts=options.scripts) if is_newest else []
    note = "compared with what the migrations make"
    if not differences:
        actual = await schema_catalog.read(pool.direct)
        async with _empty_database(pool.direct) as empty:
            if empty is not None:
                await runner.upgrade(empty, goal, options=options)
                expected = await schema_catalog.read(empty)
                await runner.upgrade(empty, "heads", options=options)
                differences = schema_catalog.mismatches(actual, expected, await schema_catalog.read(empty))
            elif is_newest:
                note = (
                    "compared with the models, without defaults and check constraints, because the database user may"
                    " not create a database"
                )
            else:
                raise MigrationError(
                    f"could not check that the schema is at {goal}: the database user may not create a database to"
                    " compare with; as a superuser, grant CREATEDB"
                )
    if differences:
        raise MigrationError(
            _join([f"the schema is not what revision {goal} makes; nothing was recorded:", *differences])
        )
    recorded = await ownership.fetch_version(pool)
    expected_now = revisions.heads if goal == "heads" else (goal,)
    is_recorded = not recorded.is_former and set(recorded.revisions) == set(expected_now)
    return CheckedStamp(goal, recorded.revision, note, is_recorded)


async def record_stamp(
    pool: Pool, checked: CheckedStamp, *, by: Actor = COMMAND_LINE, options: MigrationOptions = DEFAULTS
) -> Outcome:
    """Record a revision that was checked, unless it is recorded already.

    Raises `MigrationError` if another one was recorded since the check.
    """
    data = {"before": checked.before, "after": checked.goal}
    if checked.is_recorded:
        return Outcome(f"{checked.goal} is recorded already: nothing to do; {checked.note}", data=data)
    now = (await ownership.fetch_version(pool)).revision
    if now != checked.before:
        raise MigrationError(
            f"revision {now or 'none'} was recorded meanwhile (before: {checked.before or 'none'}); try again"
        )
    await runner.stamp(pool, checked.goal, by=by, options=options)
    return Outcome(
        f"the schema is recorded as {checked.goal} (before: {checked.before or 'none'}); {checked.note}", data=data
    )


async def stamp(
    pool: Pool,
    revision: str,
    *,
    by: Actor = COMMAND_LINE,
    progress: Progress = ignore_progress,
    options: MigrationOptions = DEFAULTS,
) -> Outcome:
    """Record that the schema is at a revision, after comparing it; see `check_stamp`, which raises."""
    checked = await check_stamp(pool, revision, progress=progress, options=options)
    return await record_stamp(pool, checked, by=by, options=options)


@contextlib.asynccontextmanager
async def _empty_database(target: ConnectTarget) -> AsyncIterator[ConnectTarget | None]:
    """Create an empty database on the same server, dropped afterwards; None if the user may not."""
    name = f"guildbook_compare_{secrets.token_hex(6)}"
    placement = target.placement or Placement()
    async with connect(target) as connection:
        try:
            await connection.execute("CREATE DATABASE " + name + " TEMPLATE template0")
        except asyncpg.InsufficientPrivilegeError:
            yield None
            return
        try:
            yield target.with_database(name).with_placement(placement)
        finally:
            await connection.execute("DROP DATABASE IF EXISTS " + name + " WITH (FORCE)")


class _StepCounter:
    """Reports progress as revisions are applied or reverted."""

    def __init__(self, progress: Progress, text: str, total: int | None) -> None:
        self._progress, self._text, self._total, self._done = progress, text, total, 0
        progress(Step(text, 0, total, "revisions"))

    def count(self, revision: str) -> None:
        self._done += 1
        self._progress(Step(self._text, self._done, self._total, "revisions"))


def _shorten(lines: Sequence[Any]) -> list[str]:
    rest = [f"- and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"- {str(line)[:140]}" for line in lines[:SHOWN]] + rest


def _join(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 10] + "…"
