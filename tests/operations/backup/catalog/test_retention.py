"""Retention keeps the newest full backup, never much more than the rules say, and never the older of two."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.operations.backup.helpers import make_settings
from utils.operations.backup.archive.manifest import Kind, Manifest, Reason
from utils.operations.backup.catalog.retention import SAFETY_DAYS, RetentionRules, find_drops, ids_to_keep

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
RULES = st.builds(RetentionRules, *[st.integers(0, 15)] * 4)


def manifest(made_at: datetime, kind: Kind = "full", reason: Reason = "scheduled", number: int = 0) -> Manifest:
    """Return the manifest of a backup made at a time; the number replaces the random end of its id."""
    id = f"{made_at:%Y%m%dT%H%M%SZ}-{number:06x}"
    return Manifest(
        id, made_at.isoformat(timespec="milliseconds"), kind, reason, f"{id}.dump", 1, "", 1, "", None, "guildbook",
        "18.4", "18.4", "0001",
    )  # fmt: skip


@st.composite
def histories(draw: st.DrawFn) -> list[Manifest]:
    """Backups of up to three years, dense or sparse, of every kind and reason."""
    span = draw(st.sampled_from((600, 86_400 * 10, 86_400 * 1_000)))
    ages = draw(st.lists(st.integers(0, span), max_size=60))
    kinds = st.sampled_from(get_args(Kind))
    reasons = st.sampled_from(get_args(Reason))
    return [
        manifest(NOW - timedelta(seconds=age), draw(kinds), draw(reasons), number) for number, age in enumerate(ages)
    ]


def is_recent_safety_copy(backup: Manifest) -> bool:
    return backup.is_safety_copy and backup.made_at >= NOW - timedelta(days=SAFETY_DAYS)


@given(histories(), RULES)
def test_keeps_the_newest_full_backup(history: list[Manifest], rules: RetentionRules) -> None:
    keep = ids_to_keep(history, rules, NOW)
    full = [backup.id for backup in history if backup.kind == "full"]
    assert keep <= {backup.id for backup in history}
    assert not full or max(full) in keep
    assert {backup.id for backup in history if is_recent_safety_copy(backup)} <= keep


@given(histories(), RULES)
def test_keeps_no_more_than_the_rules_say(history: list[Manifest], rules: RetentionRules) -> None:
    keep = ids_to_keep(history, rules, NOW)
    counted = [backup for backup in history if backup.id in keep and not is_recent_safety_copy(backup)]
    full = [backup for backup in counted if backup.kind == "full"]
    assert len(full) <= max(1, rules.newest) + rules.daily + rules.weekly + rules.monthly
    assert len(counted) - len(full) <= rules.newest


@given(
    st.lists(st.integers(0, 24 * 500), max_size=40),
    st.builds(RetentionRules, st.integers(1, 8), st.integers(0, 9), st.integers(0, 6), st.integers(0, 14)),
)
def test_keeps_the_last_of_each_day_week_and_month(ages: list[int], rules: RetentionRules) -> None:
    full = [manifest(NOW - timedelta(hours=age), number=number) for number, age in enumerate(ages)]
    keep = ids_to_keep(full, rules, NOW)
    oldest_first = sorted(full, key=lambda backup: (backup.made_at, backup.id))
    assert {backup.id for backup in oldest_first[-rules.newest :]} <= keep
    for number, period in ((rules.daily, "%Y-%m-%d"), (rules.weekly, "%G-%V"), (rules.monthly, "%Y-%m")):
        last = {backup.made_at.strftime(period): backup.id for backup in oldest_first}  # later ones overwrite earlier
        assert {last[key] for key in sorted(last, reverse=True)[:number]} <= keep


@given(histories(), RULES, st.data())
def test_an_older_backup_displaces_no_newer_one(
    history: list[Manifest], rules: RetentionRules, data: st.DataObject
) -> None:
    oldest = min((backup.made_at for backup in history), default=NOW)
    kind = data.draw(st.sampled_from(get_args(Kind)))
    older = manifest(oldest - timedelta(seconds=data.draw(st.integers(1, 10**7))), kind, number=999)
    assert ids_to_keep(history, rules, NOW) <= ids_to_keep([*history, older], rules, NOW)


@given(histories(), RULES)
def test_is_idempotent_and_independent_of_order(history: list[Manifest], rules: RetentionRules) -> None:
    keep = ids_to_keep(history, rules, NOW)
    rest = [backup for backup in reversed(history) if backup.id in keep]
    assert ids_to_keep(rest, rules, NOW) == keep


@given(histories(), RULES, st.integers(0, 86_400 * 30))
def test_passing_time_expires_safety_copies_only(history: list[Manifest], rules: RetentionRules, seconds: int) -> None:
    later = ids_to_keep(history, rules, NOW + timedelta(seconds=seconds))
    expired = ids_to_keep(history, rules, NOW) - later
    assert all(backup.is_safety_copy for backup in history if backup.id in expired)


@pytest.mark.slow
def test_the_default_rules_keep_33_of_a_year(tmp_path: Path) -> None:
    rules = RetentionRules.of(make_settings(tmp_path))
    assert rules == RetentionRules(10, 7, 4, 12)
    year = [manifest(NOW - timedelta(minutes=5 * number)) for number in range(365 * 24 * 12)]
    keep = ids_to_keep(year, rules, NOW)
    assert 10 + 6 + 3 + 11 - 2 <= len(keep) <= 10 + 7 + 4 + 12
    ages = sorted(NOW - backup.made_at for backup in year if backup.id in keep)
    assert ages[9] == timedelta(minutes=45), "the newest ten"
    assert ages[-1] > timedelta(days=300), "and one of the month eleven months ago"


def test_pruning_after_each_backup_keeps_the_same() -> None:
    rules, kept = RetentionRules(3, 4, 3, 4), list[Manifest]()
    history: list[Manifest] = []
    start = NOW - timedelta(days=200)
    for number in range(200 * 4):
        now = start + timedelta(hours=6 * number)
        backup = manifest(now)
        history.append(backup)
        keep = ids_to_keep([*kept, backup], rules, now)
        kept = [one for one in (*kept, backup) if one.id in keep]
        assert len(kept) <= 3 + 4 + 3 + 4
    assert {backup.id for backup in kept} == ids_to_keep(history, rules, NOW)


def with_rows(made_at: datetime, **rows: int) -> Manifest:
    counted = {"public.guildbook_version": 1, "ops.leases": 1} | {
        f"public.{name}": count for name, count in rows.items()
    }
    return replace(manifest(made_at), rows=counted)


FULL = {"guilds": 10, "members": 1_000, "documents": 200}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (FULL, None),
        (FULL | {"members": 700}, None),
        (FULL | {"members": 300}, "has 510 rows instead of 1,210"),
        (FULL | {"guilds": 4}, "has 4 guilds instead of 10"),
        (FULL | {"guilds": 0}, "has 0 guilds instead of 10"),
        (FULL | {"documents": 0}, "has no rows in documents, instead of 200"),
        ({"guilds": 10, "members": 1_200}, "has no rows in documents, instead of 200"),
    ],
)
def test_a_backup_with_much_less_is_a_drop(rows: dict[str, int], reason: str | None) -> None:
    before, after = with_rows(NOW, **FULL), with_rows(NOW + timedelta(hours=1), **rows)
    drops = find_drops([after, before], [], lambda first, second: False)
    assert [(drop.before.id, drop.after.id, drop.reason) for drop in drops] == (
        [] if reason is None else [(before.id, after.id, reason)]
    )
    assert find_drops([after, before], [after.id], lambda first, second: False) == [], "somebody has accepted it"


def test_tables_of_one_name_in_two_schemas_are_counted_apart() -> None:
    rows = {"public.guilds": 10, "public.members": 50, "pets.members": 100}
    backup = replace(with_rows(NOW), rows=rows)
    assert backup.data_rows == 160
    emptied = replace(with_rows(NOW + timedelta(hours=1)), rows=rows | {"pets.members": 0})
    [drop] = find_drops([backup, emptied], [], lambda first, second: False)
    assert drop.reason == "has no rows in pets.members, instead of 100"
    moved = replace(emptied, rows={"bot.guilds": 10, "bot.members": 50, "pets.members": 100})
    assert find_drops([backup, moved], [], lambda first, second: False) == [], "DB_SCHEMA was set"


def test_a_decline_in_steps_is_a_drop_too() -> None:
    history = [with_rows(NOW + timedelta(hours=number), guilds=2, members=1_000 - 170 * number) for number in range(5)]
    drops = find_drops(history, [], lambda first, second: False)
    assert [drop.after.id for drop in drops] == [history[3].id, history[4].id]
    assert {drop.before.id for drop in drops} == {history[2].id}


def test_an_older_schema_is_a_drop() -> None:
    before, after = with_rows(NOW, **FULL), with_rows(NOW + timedelta(hours=1), **FULL)
    [drop] = find_drops(
        [before, replace(after, revision="0000")], [], lambda first, second: (first, second) == ("0000", "0001")
    )
    assert "0000 instead of 0001" in drop.reason
    assert find_drops([before, replace(after, reason="before reset")], [], lambda first, second: True) == []


def test_the_later_of_two_in_one_second_is_the_newest() -> None:
    earlier, later = manifest(NOW, number=0xFFFFFF), manifest(NOW + timedelta(milliseconds=400), number=1)
    assert ids_to_keep([earlier, later], RetentionRules(1), NOW) == {later.id}
