"""Which backups stay, whatever there is: never none, never many more than the rules say, never the older of two."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.operations.backup.making import settings_for
from utils.operations.backup.manifest import Kind, Manifest
from utils.operations.backup.retention import SAFETY, SAFETY_DAYS, Rules, kept

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
RULES = st.builds(Rules, *[st.integers(0, 15)] * 4)


def manifest(made_at: datetime, kind: Kind = "full", reason: str = "scheduled", letters: int = 0) -> Manifest:
    """Return the manifest of a backup of a moment."""
    id = f"{made_at:%Y%m%dT%H%M%SZ}-{letters:06x}"
    return Manifest(
        id, made_at.isoformat(timespec="milliseconds"), kind, reason, f"{id}.dump", 1, "", 1, "", None, "guildbook",
        "18.4", "18.4", "0001",
    )  # fmt: skip


@st.composite
def shelves(draw: st.DrawFn) -> list[Manifest]:
    """Backups of a few years, close together and far apart, of every kind and reason."""
    span = draw(st.sampled_from((600, 86_400 * 10, 86_400 * 1_000)))
    ages = draw(st.lists(st.integers(0, span), max_size=60))
    kinds, reasons = st.sampled_from(get_args(Kind)), st.sampled_from(("manual", "scheduled", f"{SAFETY}restore"))
    return [
        manifest(NOW - timedelta(seconds=age), draw(kinds), draw(reasons), number) for number, age in enumerate(ages)
    ]


def is_young(one: Manifest) -> bool:
    return one.reason.startswith(SAFETY) and one.made_at >= NOW - timedelta(days=SAFETY_DAYS)


@given(shelves(), RULES)
def test_the_newest_full_one_always_stays(shelf: list[Manifest], rules: Rules) -> None:
    stays = kept(shelf, rules, NOW)
    full = [one.id for one in shelf if one.kind == "full"]
    assert stays <= {one.id for one in shelf}
    assert not full or max(full) in stays
    assert {one.id for one in shelf if is_young(one)} <= stays


@given(shelves(), RULES)
def test_no_more_stay_than_the_rules_say_beside_safety_copies(shelf: list[Manifest], rules: Rules) -> None:
    stays = kept(shelf, rules, NOW)
    counted = [one for one in shelf if one.id in stays and not is_young(one)]
    full = [one for one in counted if one.kind == "full"]
    assert len(full) <= max(1, rules.newest) + rules.daily + rules.weekly + rules.monthly
    assert len(counted) - len(full) <= rules.newest


@given(shelves(), RULES, st.data())
def test_an_older_backup_drives_no_newer_one_out(shelf: list[Manifest], rules: Rules, data: st.DataObject) -> None:
    oldest = min((one.made_at for one in shelf), default=NOW)
    kind = data.draw(st.sampled_from(get_args(Kind)))
    older = manifest(oldest - timedelta(seconds=data.draw(st.integers(1, 10**7))), kind, letters=999)
    assert kept(shelf, rules, NOW) <= kept([*shelf, older], rules, NOW)


@given(shelves(), RULES)
def test_what_stays_stays_when_it_is_asked_again_and_in_whatever_order(shelf: list[Manifest], rules: Rules) -> None:
    stays = kept(shelf, rules, NOW)
    rest = [one for one in reversed(shelf) if one.id in stays]
    assert kept(rest, rules, NOW) == stays


@given(shelves(), RULES, st.integers(0, 86_400 * 30))
def test_time_that_passes_takes_away_nothing_but_safety_copies(
    shelf: list[Manifest], rules: Rules, seconds: int
) -> None:
    later = kept(shelf, rules, NOW + timedelta(seconds=seconds))
    gone = kept(shelf, rules, NOW) - later
    assert all(one.reason.startswith(SAFETY) for one in shelf if one.id in gone)


@pytest.mark.slow
def test_a_year_of_a_backup_every_five_minutes_leaves_33_with_the_defaults(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    rules = Rules(
        settings.backup_keep, settings.backup_keep_daily, settings.backup_keep_weekly, settings.backup_keep_monthly
    )
    assert rules == Rules(10, 7, 4, 12)
    year = [manifest(NOW - timedelta(minutes=5 * number)) for number in range(365 * 24 * 12)]
    stays = kept(year, rules, NOW)
    assert 10 + 6 + 3 + 11 - 2 <= len(stays) <= 10 + 7 + 4 + 12
    ages = sorted(NOW - one.made_at for one in year if one.id in stays)
    assert ages[9] == timedelta(minutes=45), "the newest ten"
    assert ages[-1] > timedelta(days=300), "and one of the month eleven months ago"


def test_made_one_by_one_and_pruned_each_time_the_same_stay() -> None:
    rules, shelf = Rules(3, 4, 3, 4), list[Manifest]()
    every: list[Manifest] = []
    start = NOW - timedelta(days=200)
    for number in range(200 * 4):
        now = start + timedelta(hours=6 * number)
        one = manifest(now)
        every.append(one)
        stays = kept([*shelf, one], rules, now)
        shelf = [there for there in (*shelf, one) if there.id in stays]
        assert len(shelf) <= 3 + 4 + 3 + 4
    assert {one.id for one in shelf} == kept(every, rules, NOW)
