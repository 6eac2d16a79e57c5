"""The merge compared with a model in plain Python: any rows, in any order, in any batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.mirror.tables import GUILD, OTHER_GUILD, empty, history, rows, write
from tests.mirror.tables import when as moment
from utils.database import Pool
from utils.mirror.records.rows import Entry, Key, Row
from utils.mirror.write.buffer import Buffer

COLUMNS = ("nick", "roles", "pending", "flags", "left_at")


@dataclass
class Model:
    """What `members` and `changes` should hold: newer stamps win, equal values leave no trace."""

    rows: dict[Key, dict[str, Any]] = field(default_factory=dict)
    changes: list[tuple[Key, str, set[str]]] = field(default_factory=list)

    def write(self, key: Key, entry: Entry) -> None:
        known = self.rows.get(key)
        if known is None:
            if entry.may_insert:
                blank: dict[str, Any] = dict.fromkeys(COLUMNS) | {"roles": []}
                self.rows[key] = blank | entry.values | {"stamp": entry.stamp}
            return
        values = dict(entry.values)
        if values.get("left_at") is not None and known["left_at"] is not None:
            values["left_at"] = known["left_at"]
        changed = {name for name, value in values.items() if known[name] != value}
        if not changed or known["stamp"] > entry.stamp:
            return
        was, now = known["left_at"], values.get("left_at", known["left_at"])
        action = "remove" if now and not was else "return" if was and not now else "update"
        self.changes.append((key, action, changed))
        known |= values | {"stamp": entry.stamp}


KEYS = st.sampled_from([(GUILD, 1), (GUILD, 2), (OTHER_GUILD, 1)])
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "nick": st.sampled_from([None, "a", "b"]),
        "roles": st.sampled_from([[], [1], [1, 2]]),
        "pending": st.sampled_from([None, True, False]),
        "flags": st.integers(0, 1),
        "left_at": st.sampled_from([None, moment(1), moment(2)]),
    },
).filter(bool)
OBSERVATIONS = st.tuples(KEYS, st.builds(Entry, values=VALUES, may_insert=st.booleans(), stamp=st.integers(1, 6)))


def _in_order(change: tuple[Key, str, set[str]]) -> tuple[Key, str, list[str]]:
    key, action, changed = change
    return key, action, sorted(changed)


async def compare(database: Pool, model: Model) -> None:
    found = await rows(database, "members")
    expected = dict.fromkeys(found, (*COLUMNS, "stamp"))
    assert {key: {name: found[key][name] for name in expected[key]} for key in found} == model.rows
    changes = [(key, action, set(before)) for _, key, action, _, before, _ in await history(database)]
    assert sorted(map(_in_order, changes)) == sorted(map(_in_order, model.changes))
    for _, key, _, user_id, before, after in await history(database):
        assert user_id == key[1]
        assert before.keys() == after.keys()
        assert all(before[name] != after[name] for name in before)


@examples(40)
@given(batches=st.lists(st.dictionaries(KEYS, OBSERVATIONS.map(lambda pair: pair[1])), max_size=6))
async def test_batches_with_any_stamps_match_the_model(database: Pool, batches: list[dict[Key, Entry]]) -> None:
    await empty(database)
    model = Model()
    for batch in batches:
        await write(database, *((("members", key), entry) for key, entry in batch.items()))
        for key, entry in batch.items():
            model.write(key, entry)
    await compare(database, model)


@examples(25)
@given(events=st.lists(OBSERVATIONS, max_size=12), data=st.data())
async def test_newest_stamp_wins_in_any_batching(
    database: Pool, events: list[tuple[Key, Entry]], data: st.DataObject
) -> None:
    await empty(database)
    buffer = Buffer(flush_rows=1_000, flush_seconds=1.0)
    newest: dict[Key, dict[str, Any]] = {}
    for stamp, (key, entry) in enumerate(events, start=1):
        # A partial observation always finds a row, because a reconcile has inserted it.
        buffer.put(Row("members", key, entry.values, entry.may_insert or key not in newest), stamp)
        known = newest.setdefault(key, dict.fromkeys(COLUMNS) | {"roles": []})
        known |= entry.values
        if data.draw(st.booleans(), label="flush"):
            await write(database, *buffer.take().items())
    await write(database, *buffer.take().items())
    found = await rows(database, "members")
    fields = [name for name in COLUMNS if name != "left_at"]
    assert {key: {name: found[key][name] for name in fields} for key in found} == {
        key: {name: value[name] for name in fields} for key, value in newest.items()
    }
    # Of consecutive removals, any one may be the first that was written; whether the row is removed must be the same.
    assert {key: value["left_at"] is None for key, value in found.items()} == {
        key: value["left_at"] is None for key, value in newest.items()
    }
