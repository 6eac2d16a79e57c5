"""Which backups to keep, and which ones have lost so much that they must not replace others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from utils.operations.backup.archive.manifest import Manifest
from utils.settings import Settings
from utils.text import format_count

#: Days for which safety copies are kept, whatever the rules say.
SAFETY_DAYS = 7
#: A backup with less than this share of the rows, or of the guilds, of an earlier one is a drop.
DROP_SHARE = 0.5
#: Fewer rows and guilds than these may go without a drop: a bot in its first hours.
SMALL_ROWS, SMALL_GUILDS = 100, 1
#: Rows of a table which is empty in a later backup, from which on that is a drop.
FILLED_ROWS = 20
#: How far ahead of this clock a backup may be dated before it counts as made by a wrong clock.
AHEAD = timedelta(hours=1)

#: Whether the first revision is older than the second; both as manifests have them.
IsOlder = Callable[[str | None, str | None], bool]


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """How many to keep: the newest, and the last of each of the latest days, weeks and months."""

    newest: int
    daily: int = 0
    weekly: int = 0
    monthly: int = 0

    @classmethod
    def of(cls, settings: Settings) -> RetentionRules:
        """Return the rules in the settings."""
        return cls(
            settings.backup_keep, settings.backup_keep_daily, settings.backup_keep_weekly, settings.backup_keep_monthly
        )


@dataclass(frozen=True, slots=True)
class Drop:
    """A backup that has much less than earlier ones."""

    #: The last backup that had it all.
    before: Manifest
    after: Manifest
    #: What it has less of, for people.
    reason: str

    @property
    def line(self) -> str:
        """What happened and what to do, for people."""
        return (
            f"backup {self.after.id} {self.reason}: no backup is deleted. If the database has lost something, restore"
            f" {self.before.id}; if that is right, run python bot.py backup accept {self.after.id} (in Discord: /db"
            " backup accept)"
        )


def ids_to_keep(manifests: Iterable[Manifest], rules: RetentionRules, now: datetime) -> set[str]:
    """Return the ids of the backups of one database to keep: full ones by the rules, and recent safety copies.

    Partial, schema-only and empty backups count among the newest only, separately from full ones. The newest full
    backup is always kept: of all, and of those that are not dated in the future.
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.order, reverse=True)
    full = [manifest for manifest in ordered if manifest.kind == "full"]
    keep = _keep_full(full, rules)
    if any(_is_ahead(manifest, now) for manifest in full):
        keep |= _keep_full([manifest for manifest in full if not _is_ahead(manifest, now)], rules)
    keep |= {manifest.id for manifest in [one for one in ordered if one.kind != "full"][: rules.newest]}
    cutoff = now - timedelta(days=SAFETY_DAYS)
    return keep | {one.id for one in ordered if one.is_safety_copy and one.made_at >= cutoff}


def _keep_full(newest_first: Sequence[Manifest], rules: RetentionRules) -> set[str]:
    keep = {manifest.id for manifest in newest_first[: max(1, rules.newest)]}
    # A safety copy is what somebody wanted to get rid of: it is not the only one to keep.
    keep |= {manifest.id for manifest in [one for one in newest_first if not one.is_safety_copy][:1]}
    for number, period in ((rules.daily, _day), (rules.weekly, _week), (rules.monthly, _month)):
        keep |= _last_of_each(newest_first, period, number)
    return keep


def find_drops(manifests: Iterable[Manifest], accepted: Collection[str], is_older: IsOlder) -> list[Drop]:
    """Return the backups of one database that have much less than an earlier one has, oldest first.

    Each is compared with the largest before it that is no drop itself. What an operator has accepted, and what was made
    before that, is no drop. Safety copies count as neither: they are made of what is about to be replaced.
    """
    ordered = sorted((one for one in manifests if one.is_regular), key=lambda manifest: manifest.order)
    first = max((index for index, one in enumerate(ordered) if one.id in accepted), default=0)
    drops: list[Drop] = []
    intact: list[Manifest] = []
    for manifest in ordered[first:]:
        reason = _what_dropped(intact, manifest, is_older) if intact else None
        if reason is None:
            intact.append(manifest)
        else:
            drops.append(Drop(intact[-1], manifest, reason))
    return drops


def first_drops(drops: Iterable[Drop]) -> list[Drop]:
    """Return the first of the drops that come after the same backup."""
    first: dict[str, Drop] = {}
    for drop in drops:
        first.setdefault(drop.before.id, drop)
    return list(first.values())


def _what_dropped(before: Sequence[Manifest], after: Manifest, is_older: IsOlder) -> str | None:
    """Return what a backup has much less of than the ones before it, for people; None if nothing."""
    revision = before[-1].revision
    if revision is not None and (after.revision is None or is_older(after.revision, revision)):
        return f"has the schema of revision {after.revision or 'none'} instead of {revision}"
    guilds, rows = max(one.guilds for one in before), max(one.data_rows for one in before)
    if guilds and (not after.guilds or (after.guilds < guilds * DROP_SHARE and guilds - after.guilds > SMALL_GUILDS)):
        return f"has {format_count(after.guilds, 'guild')} instead of {guilds:,}"
    for name, count in before[-1].data_counts.items():
        if count >= FILLED_ROWS and not after.data_counts.get(name):
            return f"has no rows in {name}, instead of {count:,}"
    if after.data_rows < rows * DROP_SHARE and rows - after.data_rows > SMALL_ROWS:
        return f"has {format_count(after.data_rows, 'row')} instead of {rows:,}"
    return None


def _is_ahead(manifest: Manifest, now: datetime) -> bool:
    return manifest.order[0] > now + AHEAD


def _last_of_each(newest_first: Sequence[Manifest], period: Callable[[datetime], object], number: int) -> set[str]:
    last: dict[object, str] = {}
    for manifest in newest_first:
        last.setdefault(period(manifest.made_at), manifest.id)
    return set(list(last.values())[:number])


def _day(moment: datetime) -> object:
    return moment.date()


def _week(moment: datetime) -> object:
    return moment.isocalendar()[:2]


def _month(moment: datetime) -> object:
    return moment.year, moment.month
