"""Whose a backup is: of which application, and of which database on which server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from utils.database import Pool
from utils.database.target import EMBEDDED
from utils.operations.backup.archive.manifest import Manifest
from utils.service import application
from utils.settings import Settings

#: The database of an embedded server.
_EMBEDDED_DATABASE = "guildbook"
#: Stands for an application that is not known while backups name some: none of these may be taken for its own.
_UNCERTAIN = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """A database, and the application that it belongs to."""

    #: None if the database does not say, or was not asked.
    application_id: int | None
    #: The server (`ConnectTarget.location`), and the name of the database there.
    host: str
    database: str
    #: The application that the token seems to belong to: decides between several of which backups exist.
    token_id: int | None = None

    def __str__(self) -> str:
        return describe(self.application_id, self.host, self.database)

    def resolve(self, manifests: Iterable[Manifest]) -> Identity:
        """Return this identity with the application that the backups of the database name, if it is not known.

        Only that of the token counts, because two servers may have the same address in two networks. Without a token,
        the backups must name one application only.
        """
        if self.application_id is not None:
            return self
        named = {
            one.application_id
            for one in manifests
            if one.application_id is not None and (one.host, one.database) == (self.host, self.database)
        }
        if not named:
            return self
        if self.token_id in named or (self.token_id is None and len(named) == 1):
            return replace(self, application_id=self.token_id or named.pop())
        return replace(self, application_id=_UNCERTAIN)

    def owns(self, backup: Manifest, *, is_local: bool) -> bool:
        """Return whether a backup is of this database, as far as is known.

        `is_local`: a copy is in this bot's DATA_DIR, which decides where manifests say too little: those of 0.1.0 name
        neither application nor server, and every embedded server has the same name.
        """
        if backup.host is None:
            return is_local and backup.database == self.database
        if (backup.host, backup.database) != (self.host, self.database):
            return False
        if self.host == EMBEDDED and not is_local:
            return False  # every embedded server has the same name
        if backup.application_id is None or self.application_id is None:
            return is_local or self.application_id != _UNCERTAIN
        return self.application_id == backup.application_id


def describe_owner(backup: Manifest) -> str:
    """Return of which database a backup is, for people."""
    if backup.host is None:
        return f"a database {backup.database} (made by version 0.1.0, which recorded neither application nor server)"
    return describe(backup.application_id, backup.host, backup.database)


def describe(application_id: int | None, host: str | None, database: str) -> str:
    """Return a database for people: its name, its server and its application, as far as they are known."""
    where = f" at {host}" if host else ""
    return f"database {database}{where}" + (f" of application {application_id}" if application_id else "")


def identity_in_settings(settings: Settings) -> Identity:
    """Return the identity of the database in the settings, which is not asked."""
    target = settings.direct_target
    if target is None:
        return Identity(None, EMBEDDED, _EMBEDDED_DATABASE, settings.application_id)
    return Identity(None, target.location, target.database or target.user or "", settings.application_id)


async def identity_of(pool: Pool, settings: Settings) -> Identity:
    """Return the identity of the database of a pool. Raises `DatabaseError`."""
    return Identity(
        await application.fetch_owner(pool),
        pool.direct.location,
        await pool.fetchval("SELECT current_database()"),
        settings.application_id,
    )
