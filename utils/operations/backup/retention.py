"""Which backups are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from utils.operations.backup.manifest import Manifest

#: Days for which what was saved before something dangerous is kept whatever else is said.
SAFETY_DAYS = 7
#: Reasons that begin so.
SAFETY = "before "


@dataclass(frozen=True, slots=True)
class Rules:
    """So many of the newest, and the last of so many days, weeks and months."""

    newest: int
    daily: int = 0
    weekly: int = 0
    monthly: int = 0


def kept(manifests: Iterable[Manifest], rules: Rules, now: datetime) -> set[str]:
    """Return the ids of those that are kept: by the rules the full ones, and all of the last days' safety copies.

    Backups of some tables or without rows count among the newest only, beside the full ones. The newest full one is
    always kept.
    """
    # Ids say the second, then chance.
    ordered = sorted(manifests, key=lambda manifest: (manifest.made_at, manifest.id), reverse=True)
    full = [manifest for manifest in ordered if manifest.kind == "full"]
    keep = {manifest.id for manifest in full[: max(1, rules.newest)]}
    keep |= {manifest.id for manifest in [one for one in ordered if one.kind != "full"][: rules.newest]}
    for number, period in ((rules.daily, _day), (rules.weekly, _week), (rules.monthly, _month)):
        keep |= _last_of_each(full, period, number)
    young = now - timedelta(days=SAFETY_DAYS)
    return keep | {one.id for one in ordered if one.reason.startswith(SAFETY) and one.made_at >= young}


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
