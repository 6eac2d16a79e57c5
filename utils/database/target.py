"""`ConnectTarget`: where a database is and how to log in, in the forms that each driver and tool takes."""

from __future__ import annotations

import contextlib
import getpass
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, urlencode

import asyncpg
from sqlalchemy import URL

from utils.database.placement import Placement, connection_class, find_placement
from utils.database.sql import quote_identifier
from utils.exceptions import DRIVER_ERRORS, SettingsError

APPLICATION_NAME = "guildbook"
#: Seconds for connecting, and for each query, to find out where our tables are.
LOCATE_SECONDS = 10.0
#: The `source` of the embedded server's target.
EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True, repr=False)
class ConnectTarget:
    """Where a database is and how to log in: a parsed address. Its text forms never contain the password."""

    #: Names, addresses, or directories of unix sockets (starting with '/'); the first that answers is used.
    #: Empty: libpq's default, the usual socket directories and then localhost.
    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    #: None: the user of the operating system, as in libpq.
    user: str | None = None
    #: None: no password, or the one from the password file.
    password: str | None = field(default=None, repr=False)
    #: None: the name of the user.
    database: str | None = None
    #: None: libpq's default, `prefer`.
    sslmode: str | None = None
    tls: Mapping[str, str] = field(default_factory=dict, repr=False)
    driver: Mapping[str, str] = field(default_factory=dict)
    #: Start-up parameters from the URL.
    server_settings: Mapping[str, str] = field(default_factory=dict)
    #: Behind a pooler in transaction mode: no prepared statements, session state or start-up parameters.
    pooled: bool = False
    #: Whether the address states if there is a pooler (`pgbouncer=true` or `false`), so that detection is skipped.
    is_declared: bool = False
    #: The schema of the main tables; None: the one to which the server's `search_path` leads.
    schema: str | None = None
    #: Where our tables are, once that was found out: see `located`.
    placement: Placement | None = None
    #: The variable it was read from.
    source: str = ""
    #: What the operator should know about the address: one line each, without secrets.
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_socket(self) -> bool:
        """Whether every host is a unix socket."""
        return bool(self.hosts) and all(host.startswith("/") for host in self.hosts)

    @property
    def location(self) -> str:
        """The server, as backups record it: `embedded`, or the hosts and ports of the address."""
        if self.source == EMBEDDED:
            return EMBEDDED
        if "service" in self.driver:
            return f"service {self.driver['service']}"
        return ",".join(f"{host.lower()}:{port}" for host, port in zip(self.hosts, self.ports, strict=False)) or "local"

    def with_database(self, database: str) -> ConnectTarget:
        """Return the target of another database on the same server."""
        return replace(self, database=database)

    def through_pooler(self) -> ConnectTarget:
        """Return the same target for a pooler in transaction mode."""
        return replace(self, pooled=True)

    def with_placement(self, placement: Placement) -> ConnectTarget:
        """Return the target of a Guildbook in these schemas, which need not exist."""
        settings = {key: value for key, value in self.server_settings.items() if key != "search_path"}
        return replace(self, schema=placement.main, placement=placement, server_settings=settings)

    @property
    def search_path(self) -> str | None:
        """The `search_path` that our sessions set; None: the one that the server gives them."""
        given = self.server_settings.get("search_path")
        return ", ".join(filter(None, (quote_identifier(self.schema), given))) if self.schema else given

    def connect_kwargs(self) -> dict[str, Any]:
        """Return keyword arguments for `asyncpg.connect` and `asyncpg.create_pool`.

        Raises `SettingsError` when the address has no user and the process has no user name.
        """
        if self.user is None and "service" not in self.driver:
            self._require_user_name()
        kwargs: dict[str, Any] = {
            "host": list(self.hosts) or None,
            "port": list(self.ports) or None,
            "user": self.user,
            "password": self.password,
            "database": self.database,
        }
        if self.sslmode is not None:
            kwargs["ssl"] = self.sslmode
        elif self.is_socket:
            kwargs["ssl"] = False  # overrides PGSSLMODE: there is no TLS on a unix socket
        from_dsn = {**self.tls, **{k: v for k, v in self.driver.items() if k == "service"}}
        if from_dsn:
            # asyncpg takes these from a DSN only. The other arguments override everything else in it.
            kwargs["dsn"] = f"postgresql:///?{urlencode(from_dsn, quote_via=quote)}"
        kwargs.update({key: value for key, value in self.driver.items() if key != "service"})
        settings, path = dict(self.server_settings), self.search_path
        if self.pooled:
            # A pooler refuses or ignores this start-up parameter, so each transaction sets it.
            settings.pop("search_path", None)
            kwargs["statement_cache_size"] = 0
        else:
            settings.setdefault("application_name", APPLICATION_NAME)
            if path is not None:
                settings["search_path"] = path
        if settings:
            kwargs["server_settings"] = settings
        kwargs["connection_class"] = connection_class(self.placement or Placement(), path if self.pooled else None)
        return kwargs

    def _require_user_name(self) -> None:
        try:
            _ = os.environ.get("PGUSER") or getpass.getuser()
        except (KeyError, OSError, ImportError):  # the user id is unknown to the system, as in many containers
            raise SettingsError(
                f"{self.source or 'DATABASE_URL'}: the address has no user, and user id {os.getuid()} has no name on"
                " this machine; expected postgresql://user:password@host:5432/database",
                variables=[self.source or "DATABASE_URL"],
            ) from None

    def check_files(self) -> None:
        """Raise `SettingsError` for a file of the TLS parameters that cannot be read or holds no certificate."""
        if self.sslmode == "disable":
            return
        for option in sorted({"sslrootcert", "sslcert", "sslkey", "sslcrl"} & self.tls.keys()):
            path, what = self.tls[option], f"{self.source or 'the address'}: {option}"
            try:
                with open(path, "rb") as file:
                    file.read(1)
                if option in ("sslrootcert", "sslcrl"):
                    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
            except ssl.SSLError:
                problem = f"{what}: {path} contains no certificate in PEM format"
            except OSError as exc:
                problem = f"{what}: {path} cannot be read: {exc.strerror}"
            else:
                continue
            raise SettingsError(problem, variables=[self.source] if self.source else [])

    def sqlalchemy_url(self) -> URL:
        """Return the URL for `create_async_engine`; host and password are in `sqlalchemy_connect_args`."""
        return URL.create("postgresql+asyncpg", username=self.user, database=self.database)

    def sqlalchemy_connect_args(self) -> dict[str, Any]:
        """Return `connect_args` for `create_async_engine` (SQLAlchemy takes no sslmode in its URL)."""
        kwargs = self.connect_kwargs()
        if self.pooled:
            kwargs["prepared_statement_cache_size"] = 0
            # Unnamed: asyncpg sends the text with each execution, which another backend may serve.
            kwargs["prepared_statement_name_func"] = lambda: ""
        return kwargs

    def libpq_url(self) -> str:
        """Return an address for libpq's tools, without the password, which is in `libpq_environment`."""
        options: dict[str, str] = {}
        authority = ""
        if any(host.startswith("/") for host in self.hosts):
            options["host"] = ",".join(self.hosts)
            options["port"] = ",".join(map(str, self.ports))
        else:
            hosts = (f"[{host}]" if ":" in host else host for host in self.hosts)
            authority = ",".join(f"{host}:{port}" for host, port in zip(hosts, self.ports, strict=True))
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        if self.sslmode:
            options["sslmode"] = self.sslmode
        options.update({key: value for key, value in self.tls.items() if key != "sslpassword"})
        options.update({key: value for key, value in self.driver.items() if key in ("target_session_attrs", "service")})
        # A pooler refuses it, as in `connect_kwargs`.
        path = {} if self.search_path is None or self.pooled else {"search_path": self.search_path}
        options.update(_libpq_settings({**self.server_settings, **path}))
        query = f"?{urlencode(options, quote_via=quote, safe='/,')}" if options else ""
        return f"postgresql://{user}{authority}/{quote(self.database or '', safe='')}{query}"

    def libpq_environment(self) -> dict[str, str]:
        """Return the environment variables that complete `libpq_url`: the password, if any."""
        return {"PGPASSWORD": self.password} if self.password is not None else {}

    def __str__(self) -> str:
        return self.libpq_url()

    def __repr__(self) -> str:
        hidden = "***" if self.password is not None else None
        return f"<ConnectTarget {self.libpq_url()} password={hidden} pooled={self.pooled} source={self.source!r}>"


def _libpq_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """Return start-up parameters as libpq takes them: most only as `-c name=value` in its `options`."""
    known = {key: value for key, value in settings.items() if key in ("application_name", "options")}
    others = " ".join(
        f"-c {key}={value.replace(chr(92), chr(92) * 2).replace(' ', chr(92) + ' ')}"
        for key, value in settings.items()
        if key not in known
    )
    if others:
        known["options"] = f"{known['options']} {others}" if "options" in known else others
    return known


async def located(target: ConnectTarget) -> ConnectTarget:
    """Connect, and return the target with its placement.

    Raises the driver's errors, and `DatabaseError` where no schema can hold our tables.
    """
    if target.placement is not None:
        return target
    # Without a schema: whether the server's own search_path leads there is to be found out.
    kwargs = replace(target, schema=None).connect_kwargs() | {"statement_cache_size": 0}
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
        **kwargs, timeout=LOCATE_SECONDS, command_timeout=LOCATE_SECONDS
    )
    try:
        found = await find_placement(connection, target.schema)
    finally:
        with contextlib.suppress(*DRIVER_ERRORS):
            await connection.close(timeout=1.0)
    target = replace(target, placement=found.placement)
    if found.is_current:
        # Behind a pooler each statement would need a transaction that sets it.
        return replace(target, schema=None) if target.pooled else target
    if target.schema is None:  # our tables are there, but new ones would be created elsewhere
        settings = {**target.server_settings, "search_path": found.path}
        return replace(target, schema=found.placement.main, server_settings=settings)
    return target
