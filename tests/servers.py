"""The PostgreSQL versions that tests may run on: those of the embedded server, and those of the system's packages.

`python -m tests.servers` prints the settings of tests/conftest.py with which `make test-databases` runs tests again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.database.pooler import PROGRAM
from utils.database.binaries import Account, binaries
from utils.database.embedded import EmbeddedServer
from utils.exceptions import DatabaseError

#: The oldest and the newest that hosts commonly offer, and one between.
VERSIONS = (15, 16, 18)
#: What tests use unless GUILDBOOK_TEST_PG names another one.
DEFAULT = 18
#: Where Debian's and Ubuntu's packages install the servers, several versions side by side.
_PACKAGED = "/usr/lib/postgresql/{version}/bin"


#: Of a test's server, beside those of an embedded server that is not durable: a database is made and dropped for each
#: test, which scans the buffers and writes what a replica would need.
_SETTINGS = "shared_buffers = 32MB\nwal_level = minimal\nmax_wal_senders = 0\n"
#: Since PostgreSQL 18: read files directly instead of through processes of its own.
_SETTINGS_18 = "io_method = sync\n"


class ThrowawayServer(EmbeddedServer):
    """A server that is made for creating and dropping many databases. It does not survive a crash."""

    def __init__(self, data_dir: Path, version: int = DEFAULT) -> None:
        super().__init__(data_dir, version, durable=False)

    def _initialise(self, bin_dir: Path, account: Account) -> None:
        super()._initialise(bin_dir, account)
        with (self.cluster / "postgresql.conf").open("a") as file:
            file.write(_SETTINGS + (_SETTINGS_18 if self.version >= 18 else ""))


class PackagedServer(ThrowawayServer):
    """A throwaway server whose programs come from the system's packages."""

    @property
    def bin_dir(self) -> Path:
        return Path(_PACKAGED.format(version=self.version))


def make_server(directory: Path, version: int = DEFAULT) -> EmbeddedServer:
    """Return a throwaway server of one major version, which is not started. It does not survive a crash.

    Raises `DatabaseError` when this machine does not have that version.
    """
    if (Path(_PACKAGED.format(version=version)) / "postgres").exists():
        return PackagedServer(directory, version)
    binaries(version)
    return ThrowawayServer(directory, version)


def is_available(version: int) -> bool:
    """Return whether this machine has a major version of PostgreSQL."""
    try:
        make_server(Path(), version)
    except DatabaseError:
        return False
    return True


def needs_version(version: int) -> pytest.MarkDecorator:
    """Return the mark that skips a test where this machine does not have a major version of PostgreSQL."""
    return pytest.mark.skipif(not is_available(version), reason=f"needs PostgreSQL {version}")


def settings() -> list[str]:
    """Return the settings of tests/conftest.py that this machine can run tests with, beside the defaults."""
    others = [f"GUILDBOOK_TEST_PG={version}" for version in VERSIONS if version != DEFAULT and is_available(version)]
    return others if PROGRAM is None else [*others, "GUILDBOOK_TEST_POOLER=1"]


if __name__ == "__main__":
    print(*settings())
