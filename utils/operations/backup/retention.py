"""Which backups to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from utils.operations.backup.manifest import Manifest
from utils.settings import Settings

#: Days for which safety copies are kept, whatever the rules say.
SAFETY_DAYS = 7


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


def ids_to_keep(manifests: Iterable[Manifest], rules: RetentionRules, now: datetime) -> set[str]:
    """Return the ids of the backups to keep: full ones by the rules, and all safety copies of the last days.

    Partial and schema-only backups count among the newest only, separately from full ones. The newest full backup is
    always kept.
    """
    # Ids tell the order only to the second; within a second they are random.
    ordered = sorted(manifests, key=lambda manifest: (manifest.made_at, manifest.id), reverse=True)
    full = [manifest for manifest in ordered if manifest.kind == "full"]
    keep = {manifest.id for manifest in full[: max(1, rules.newest)]}
    keep |= {manifest.id for manifest in [one for one in ordered if one.kind != "full"][: rules.newest]}
    for number, period in ((rules.daily, _day), (rules.weekly, _week), (rules.monthly, _month)):
        keep |= _last_of_each(full, period, number)
    cutoff = now - timedelta(days=SAFETY_DAYS)
    return keep | {one.id for one in ordered if one.is_safety_copy and one.made_at >= cutoff}


def _last_of_each(newest_first: list[Manifest], period: Callable[[datetime], object], number: int) -> set[str]:
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
