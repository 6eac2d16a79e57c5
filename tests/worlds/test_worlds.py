"""Every operation works in every kind of database, or is refused with one clear line.

`make test-databases` runs this on every version of PostgreSQL that the machine has.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import in_thread
from tests.servers import DEFAULT, VERSIONS, make_server, needs_version
from tests.worlds import foreign, worlds
from tests.worlds.operations import OPERATIONS, examine
from utils.database.embedded import EmbeddedServer
from utils.exceptions import GuildbookError

pytestmark = pytest.mark.slow

_OTHER_VERSIONS = [pytest.param(version, marks=needs_version(version)) for version in VERSIONS if version != DEFAULT]


@pytest.fixture(scope="module", params=_OTHER_VERSIONS)
def other_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A server of another version than the other tests use."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-"))
    server = make_server(directory, request.param)
    try:
        in_thread(server.start())
        yield server
    finally:
        in_thread(server.stop(force=True))
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("name", worlds.WORLDS)
async def test_everything_works(
    name: str, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await do_everything(name, server, monkeypatch, tmp_path)


async def test_everything_works_on_other_versions(
    other_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await do_everything("shared", other_server, monkeypatch, tmp_path)


async def do_everything(name: str, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Do every operation in a world, and raise what failed together at the end."""
    if name in worlds.NEEDS_POOLER:
        pytest.skip("needs pgbouncer (apt-get install pgbouncer)")
    failed: list[Exception] = []
    async with worlds.create(name, server) as world:
        before = await foreign.describe(server, world.admin) if world.is_shared else []
        for operation, work in OPERATIONS.items():
            place = directory / operation
            place.mkdir()
            try:
                with monkeypatch.context() as patched:
                    await work(world, patched, place)
                if world.is_shared:
                    assert await foreign.describe(server, world.admin) == before
            except Exception as error:
                error.add_note(f"{operation} in the world {name}")
                failed.append(error)
                if operation == "migrate":
                    break
    if failed:
        raise ExceptionGroup(f"failed in the world {name}", failed)


@pytest.mark.parametrize("name", worlds.REFUSED)
async def test_is_refused_with_one_line(
    name: str, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, pattern = worlds.REFUSED[name]
    async with worlds.create(name, server) as world:
        for operation, work in OPERATIONS.items():
            if operation == "doctor":
                findings = await examine(world, monkeypatch, tmp_path)
                lines = [f"{finding.seen}: {finding.todo}" for finding in findings if finding.state == "fail"]
            else:
                with monkeypatch.context() as patched, pytest.raises(GuildbookError) as caught:
                    await work(world, patched, tmp_path)
                lines = [str(caught.value)]
            assert len(lines) == 1, (operation, lines)
            assert re.search(pattern, lines[0]), (operation, lines)
            assert "\n" not in lines[0], (operation, lines)
