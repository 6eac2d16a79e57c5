"""The progress of every action: what has a total ends at it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.operations.backup.helpers import dropping_scratch_databases, fill, make_service, make_settings
from tests.operations.migrations.support import KNOWN
from utils.database import Pool
from utils.operations.action import Step
from utils.operations.importing import exporting, importer
from utils.operations.migrations import admin
from utils.operations.upkeep import maintain

pytestmark = pytest.mark.slow


class Steps:
    """Collects the steps of an action."""

    def __init__(self) -> None:
        self.seen: list[Step] = []

    def __call__(self, step: Step) -> None:
        self.seen.append(step)

    def take_unfinished(self) -> list[str]:
        """Return what did not reach its total, or went beyond it; forgets all steps."""
        seen, self.seen = self.seen, []
        last = {step.text: step for step in seen}
        beyond = [step for step in seen if step.total is not None and step.done > step.total]
        return [str(step) for step in [*last.values(), *beyond] if step.total is not None and step.done != step.total]


async def test_what_has_a_total_ends_at_it(tmp_path: Path, database: Pool) -> None:
    (tmp_path / "store").mkdir()
    steps, service = Steps(), make_service(tmp_path, backup_url=f"file://{tmp_path}/store")
    await fill(database)
    async with dropping_scratch_databases(database.target):
        await admin.downgrade(database, KNOWN[-2], backup=None, progress=steps)
        assert steps.seen
        assert steps.take_unfinished() == []
        await service.create(database, progress=steps)
        await admin.upgrade(database, progress=steps)
        assert steps.take_unfinished() == []
        assert (await service.verify("latest", progress=steps)).ok
        assert steps.take_unfinished() == []
        assert (await service.verify("latest", is_deep=True, progress=steps)).ok
        assert steps.take_unfinished() == []
        assert (await service.drill(database, progress=steps)).ok
        assert steps.take_unfinished() == []
        await service.restore(database, "latest", progress=steps)
        assert steps.take_unfinished() == []
        await service.restore(database, "latest", tables=("members",), progress=steps)
        assert steps.take_unfinished() == []
        await service.restore(database, "latest", documents_of=0, progress=steps)
        assert steps.take_unfinished() == []
        await service.restore(database, "latest", whole_database=True, progress=steps)
        assert steps.take_unfinished() == []
    await maintain.maintain(database, progress=steps)
    assert steps.take_unfinished() == []
    await exporting.export(database, "table:members", tmp_path / "members.csv", form="csv", progress=steps)
    assert steps.take_unfinished() == []
    file = tmp_path / "documents.json"
    file.write_text(json.dumps({f"key {n}": {"n": n} for n in range(20_000)}) + "\n" * 100_000)
    await importer.import_files(database, make_settings(tmp_path), [file], progress=steps)
    assert steps.take_unfinished() == []
