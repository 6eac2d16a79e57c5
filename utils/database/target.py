"""A database's address, in every form that something here asks for."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, urlencode

from sqlalchemy import URL

DEFAULT_PORT = 5432
#: libpq's, weakest first (PostgreSQL manual, 34.19).
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
APPLICATION_NAME = "guildbook"


@dataclass(frozen=True, slots=True, repr=False)
class ConnectTarget:
    """Where a database is and how to log in; its text forms never hold the password."""

    #: Names, addresses, or directories of unix sockets (they begin with '/'); the first that answers is used.
    #: Empty: where libpq looks by itself, the usual socket directories and then localhost.
    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    #: None: the operating system's user, as libpq does.
    user: str | None = None
    #: None: no password, or the one in the password file.
    password: str | None = field(default=None, repr=False)
    #: None: named like the user.
    database: str | None = None
    #: None: libpq's default, `prefer`.
    sslmode: str | None = None
    tls: Mapping[str, str] = field(default_factory=dict, repr=False)
    driver: Mapping[str, str] = field(default_factory=dict)
    #: Start-up parameters that the address itself asked for.
    server_settings: Mapping[str, str] = field(default_factory=dict)
    #: True behind a pooler in transaction mode: no prepared statements, no session state, no start-up parameters.
    pooled: bool = False
    #: The variable that it came from.
    source: str = ""

    @property
    def is_socket(self) -> bool:
        """Whether all hosts are directories of unix sockets."""
        return bool(self.hosts) and all(host.startswith("/") for host in self.hosts)

    def with_database(self, database: str) -> ConnectTarget:
        """Return the same server's other database."""
        return replace(self, database=database)

    def connect_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of `asyncpg.connect` and `asyncpg.create_pool`."""
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
            kwargs["ssl"] = False  # whatever PGSSLMODE says: there is no TLS on a unix socket
        from_dsn = {**self.tls, **{k: v for k, v in self.driver.items() if k == "service"}}
        if from_dsn:
            # asyncpg takes these from a URL only; with the other arguments given, nothing else is read from it.
            kwargs["dsn"] = f"postgresql:///?{urlencode(from_dsn, quote_via=quote)}"
        kwargs.update({key: value for key, value in self.driver.items() if key != "service"})
        settings = dict(self.server_settings)
        if self.pooled:
            kwargs["statement_cache_size"] = 0
        else:
            settings.setdefault("application_name", APPLICATION_NAME)
        if settings:
            kwargs["server_settings"] = settings
        return kwargs

    def sqlalchemy_url(self) -> URL:
        """Return the URL for `create_async_engine`; the login travels in `sqlalchemy_connect_args`."""
        return URL.create("postgresql+asyncpg", username=self.user, database=self.database)

    def sqlalchemy_connect_args(self) -> dict[str, Any]:
        """Return `connect_args` for `create_async_engine` (SQLAlchemy takes no sslmode in its URL)."""
        kwargs = self.connect_kwargs()
        if self.pooled:
            kwargs["prepared_statement_cache_size"] = 0
            kwargs["prepared_statement_name_func"] = lambda: f"__asyncpg_{uuid.uuid4().hex}__"
        return kwargs

    def libpq_url(self) -> str:
        """Return the address as libpq's tools read it, without the password: that goes into `libpq_environment`."""
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
        options.update(_libpq_settings(self.server_settings))
        query = f"?{urlencode(options, quote_via=quote, safe='/,')}" if options else ""
        return f"postgresql://{user}{authority}/{quote(self.database or '', safe='')}{query}"

    def libpq_environment(self) -> dict[str, str]:
        """Return the variables that a libpq tool needs beside `libpq_url`: the password, where there is one."""
        return {"PGPASSWORD": self.password} if self.password is not None else {}

    def __str__(self) -> str:
        return self.libpq_url()

    def __repr__(self) -> str:
        hidden = "***" if self.password is not None else None
        return f"<ConnectTarget {self.libpq_url()} password={hidden} pooled={self.pooled} source={self.source!r}>"


def _libpq_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """Spell start-up parameters as libpq takes them: most only as `-c name=value` in its parameter `options`."""
    known = {key: value for key, value in settings.items() if key in ("application_name", "options")}
    others = " ".join(
        f"-c {key}={value.replace(chr(92), chr(92) * 2).replace(' ', chr(92) + ' ')}"
        for key, value in settings.items()
        if key not in known
    )
    if others:
        known["options"] = f"{known['options']} {others}" if "options" in known else others
    return known
