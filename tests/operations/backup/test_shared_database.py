"""Backups of a database that other programs use too contain our objects alone, and leave theirs as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.operations.backup.helpers import fill, make_backup, make_service, open_pool
from tests.operations.backup.shared import SharedDatabase, shared_database
from utils.database.embedded import EmbeddedServer
from utils.operations.backup.archive import list_contents

pytestmark = pytest.mark.slow


@pytest.fixture
async def shared(server: EmbeddedServer) -> AsyncIterator[SharedDatabase]:
    """Our tables, with rows, beside those of other programs that refer to them."""
    async with shared_database(server) as shared:
        async with open_pool(shared.ours) as pool:
            await fill(pool)
        await shared.add_references()
        yield shared


async def test_backs_up_our_objects_alone(tmp_path: Path, shared: SharedDatabase) -> None:
    before = await shared.dump_others()
    service = make_service(tmp_path)
    async with open_pool(shared.ours) as pool:
        manifest = await make_backup(service, pool)
    assert manifest.rows["public.members"] == 3_000
    assert not [name for name in manifest.rows if name.startswith(("auth.", "shop.", "stats.", "public.legacy"))]
    tools = shared.server.bin_dir
    listed = await list_contents(tmp_path / "backups" / manifest.file, tools, name=manifest.file)
    for foreign in ("EXTENSION", "PUBLICATION", "EVENT TRIGGER", " auth ", " shop ", " stats ", "legacy_bans"):
        assert foreign not in listed, foreign
    assert " SEQUENCE SET ops change_ids " in listed
    assert " VIEW public role_membership " in listed
    assert await shared.dump_others() == before


async def test_a_drill_of_it_succeeds(tmp_path: Path, shared: SharedDatabase) -> None:
    service = make_service(tmp_path)
    async with open_pool(shared.ours) as pool:
        manifest = await make_backup(service, pool)
        before = await shared.dump_others()
        outcome = await service.drill(pool)
        assert outcome.ok, outcome.text
        assert outcome.data["rows"] == manifest.total_rows
    assert await shared.dump_others() == before
