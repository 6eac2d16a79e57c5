"""Where the database is: every form of address that hosts and libpq use, parsed into one `ConnectTarget`.

Precedence, the first that is set wins (an empty value counts as not set):

1. `DATABASE_URL` (with `DATABASE_UNPOOLED_URL` beside it, the former is pooled and the latter is the direct address);
2. `DATABASE_UNPOOLED_URL` alone;
3. `PGHOST`, `PGPORT`, `PGUSER`, `PGPASSWORD`, `PGDATABASE`, `PGSSLMODE`, when `PGHOST` is set;
4. `DB_HOST`, `DB_PORT`, `DB_USER`, `DB_PASSWORD`, `DB_NAME`, `DB_SSL`, when `DB_HOST` is set;
5. `DATABASE_PUBLIC_URL`;
6. nothing: the embedded server.
"""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from pydantic import SecretStr
from sqlalchemy import URL

from utils.exceptions import SettingsError

DEFAULT_PORT = 5432
#: libpq's, weakest first (PostgreSQL manual, 34.19).
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
APPLICATION_NAME = "guildbook"
_SCHEMES = ("postgres", "postgresql", "postgresql+asyncpg")
#: TLS parameters that asyncpg reads from a DSN, as libpq does (PostgreSQL manual, 34.1.2).
_TLS_OPTIONS = frozenset(
    {"sslrootcert", "sslcert", "sslkey", "sslcrl", "sslpassword", "sslnegotiation"}
    | {"ssl_min_protocol_version", "ssl_max_protocol_version"}
)
_DRIVER_OPTIONS = frozenset({"target_session_attrs", "krbsrvname", "gsslib", "passfile", "service", "servicefile"})
#: Parameters of other drivers, which asyncpg would send to the server as unknown settings.
_IGNORED = frozenset(
    {"connect_timeout", "connection_limit", "channel_binding", "gssencmode", "gssdelegation", "client_encoding"}
    | {"keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout", "hostaddr"}
    | {"load_balance_hosts", "require_auth", "requirepeer", "sslcompression", "sslsni", "sslcertmode"}
    | {"fallback_application_name", "pool_timeout", "schema", "async_fallback"}
    | {"statement_cache_size", "prepared_statement_cache_size"}
)
_TRUE = frozenset(("1", "true", "yes", "on"))
_FALSE = frozenset(("0", "false", "no", "off"))


@dataclass(frozen=True, slots=True, repr=False)
class ConnectTarget:
    """The address of a database and how to log in. Its text forms never contain the password."""

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
    #: The variable it was read from.
    source: str = ""

    @property
    def is_socket(self) -> bool:
        """Whether every host is a unix socket."""
        return bool(self.hosts) and all(host.startswith("/") for host in self.hosts)

    def with_database(self, database: str) -> ConnectTarget:
        """Return the target of another database on the same server."""
        return replace(self, database=database)

    def connect_kwargs(self) -> dict[str, Any]:
        """Return keyword arguments for `asyncpg.connect` and `asyncpg.create_pool`."""
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
        settings = dict(self.server_settings)
        if self.pooled:
            kwargs["statement_cache_size"] = 0
        else:
            settings.setdefault("application_name", APPLICATION_NAME)
        if settings:
            kwargs["server_settings"] = settings
        return kwargs

    def sqlalchemy_url(self) -> URL:
        """Return the URL for `create_async_engine`; host and password are in `sqlalchemy_connect_args`."""
        return URL.create("postgresql+asyncpg", username=self.user, database=self.database)

    def sqlalchemy_connect_args(self) -> dict[str, Any]:
        """Return `connect_args` for `create_async_engine` (SQLAlchemy takes no sslmode in its URL)."""
        kwargs = self.connect_kwargs()
        if self.pooled:
            kwargs["prepared_statement_cache_size"] = 0
            kwargs["prepared_statement_name_func"] = lambda: f"__asyncpg_{uuid.uuid4().hex}__"
        return kwargs

    def libpq_url(self) -> str:
        """Return the address for libpq's tools, without the password, which is in `libpq_environment`."""
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
        """Return the environment variables that complete `libpq_url`: the password, if any."""
        return {"PGPASSWORD": self.password} if self.password is not None else {}

    def __str__(self) -> str:
        return self.libpq_url()

    def __repr__(self) -> str:
        hidden = "***" if self.password is not None else None
        return f"<ConnectTarget {self.libpq_url()} password={hidden} pooled={self.pooled} source={self.source!r}>"


def resolve_targets(values: Mapping[str, SecretStr | str | None]) -> tuple[ConnectTarget | None, ConnectTarget | None]:
    """Return the target and the direct target that these variables name; None, None: the embedded server.

    The direct target bypasses a pooler, for migrations, LISTEN and pg_dump. Without a pooler it equals the target.
    Raises `SettingsError`, which names the variable and what is wrong with it but never shows the value of a URL.
    """
    get = _reader(values)
    url, unpooled = get("DATABASE_URL"), get("DATABASE_UNPOOLED_URL")
    if url and unpooled and url != unpooled:
        pooled = parse_url(url, source="DATABASE_URL", pooled=True)
        return pooled, parse_url(unpooled, source="DATABASE_UNPOOLED_URL")
    public = get("DATABASE_PUBLIC_URL")
    if url:
        target: ConnectTarget | None = parse_url(url, source="DATABASE_URL")
    elif unpooled:
        target = parse_url(unpooled, source="DATABASE_UNPOOLED_URL")
    elif (target := _from_parts(get, "PG", "PGSSLMODE") or _from_parts(get, "DB_", "DB_SSL")) is None and public:
        target = parse_url(public, source="DATABASE_PUBLIC_URL")
    return target, target


def parse_url(url: str, *, source: str = "DATABASE_URL", pooled: bool = False) -> ConnectTarget:
    """Parse a URL. Raises `SettingsError`, whose message never contains the password."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(#.*)?\Z", url.strip(), re.DOTALL)
    if match is None or match[1].lower() not in _SCHEMES:
        raise _invalid(source, "does not begin with postgres://, postgresql:// or postgresql+asyncpg://")
    authority, path, query, fragment = match[2], match[3], match[4] or "", match[5]
    if fragment or "@" in path or ("@" in query and "@" not in authority):
        raise _invalid(source, "contains an unescaped '/', '?' or '#' in its user or password: write %2F, %3F, %23")
    userinfo, _, hosts_text = authority.rpartition("@")
    raw_user, _, raw_password = userinfo.partition(":")
    options = _query(query, source)

    def from_either(option: str, text: str) -> str | None:
        return options.pop(option, None) or _unquote(text, source) or None

    user, password = from_either("user", raw_user), from_either("password", raw_password)
    database = options.pop("dbname", None) or from_either("database", path.removeprefix("/"))
    ports_text, host_option = options.pop("port", None), options.pop("host", None)
    if host_option:  # overrides the authority, as in libpq: postgres://user@localhost/db?host=/cloudsql/name
        hosts, ports = _hosts(host_option.split(","), ports_text, source)
    elif hosts_text:
        hosts, ports = _hosts(hosts_text.split(","), ports_text, source, quoted=True)
    else:
        hosts, ports = (), tuple(_port(text, source) for text in (ports_text or "").split(",") if text)

    sslmode = _sslmode(options.pop("sslmode", None) or options.pop("ssl", None), source)
    options.pop("ssl", None)
    through_pooler = pooled or _flag(options.pop("pgbouncer", None))
    tls = {key: options.pop(key) for key in sorted(_TLS_OPTIONS & options.keys())}
    driver = {key: options.pop(key) for key in sorted(_DRIVER_OPTIONS & options.keys())}
    return ConnectTarget(
        hosts=hosts,
        ports=ports,
        user=user,
        password=password,
        database=database,
        sslmode=sslmode,
        tls=tls,
        driver=driver,
        server_settings={key: value for key, value in options.items() if key not in _IGNORED},
        pooled=through_pooler,
        source=source,
    )


def _reader(values: Mapping[str, SecretStr | str | None]) -> Callable[[str], str | None]:
    """Return a function that maps a variable's name to its text; None when it is not set."""

    def get(name: str) -> str | None:
        value = values.get(name)
        if value is None:
            return None
        return (value.get_secret_value() if isinstance(value, SecretStr) else value).strip() or None

    return get


def _from_parts(get: Callable[[str], str | None], prefix: str, ssl_variable: str) -> ConnectTarget | None:
    name = "PGDATABASE" if prefix == "PG" else "DB_NAME"
    host = get(f"{prefix}HOST")
    if host is None:
        # PGUSER and PGPASSWORD alone are common in shells; DB_NAME alone can only be meant for Guildbook.
        if prefix == "DB_" and (get("DB_NAME") or get("DB_USER") or get("DB_PASSWORD")):
            raise SettingsError(
                "DB_HOST: not set although other DB_* variables are: set it, or remove them", variables=["DB_HOST"]
            )
        return None
    source = f"{prefix}HOST"
    hosts, ports = _hosts(host.split(","), get(f"{prefix}PORT"), source)
    return ConnectTarget(
        hosts=hosts,
        ports=ports,
        user=get(f"{prefix}USER"),
        password=get(f"{prefix}PASSWORD"),
        database=get(name),
        sslmode=_sslmode(get(ssl_variable), ssl_variable),
        source=source,
    )


def _hosts(
    parts: list[str], ports_text: str | None, source: str, *, quoted: bool = False
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    hosts: list[str] = []
    ports: list[int | None] = []
    for part in (raw.strip() for raw in parts):
        bracketed = re.fullmatch(r"\[([^\[\]]+)\](?::(.*))?", part)
        if bracketed:
            host, port = bracketed[1], bracketed[2]
        elif part.startswith("/") or _is_ipv6(part):
            host, port = part, None  # a socket directory, or an IPv6 address in PGHOST, which has no brackets
        else:
            host, _, port = part.partition(":")
        host = _unquote(host, source) if quoted else host
        if not _is_host(host):
            raise _invalid(source, "contains an invalid host name")
        hosts.append(host)
        ports.append(_port(port, source) if port else None)
    given = [_port(text.strip(), source) if text.strip() else DEFAULT_PORT for text in (ports_text or "").split(",")]
    if len(given) not in (1, len(hosts)):
        raise _invalid(source, f"names {len(hosts)} hosts but {len(given)} ports: give one port, or one for each host")
    given = given * len(hosts) if len(given) == 1 else given
    return tuple(hosts), tuple(port or given[index] for index, port in enumerate(ports))


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _is_host(host: str) -> bool:
    if not host or "\0" in host:
        return False
    if host.startswith("/"):
        return True
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return not any(character.isspace() or character in "[]@/?#" for character in host)


def _port(text: str, source: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65_536):
        # Never show the text: after an unescaped '/' in the password it would be the start of the password.
        raise _invalid(
            source,
            "contains a port that is not a number from 1 to 65535 (a '/' in the password must be %2F)",
        )
    return int(text)


def _sslmode(text: str | None, source: str) -> str | None:
    if text is None:
        return None
    lowered = text.strip().lower().replace("_", "-")
    if lowered in _TRUE:
        return "require"
    if lowered in _FALSE:
        return "disable"
    if lowered not in SSL_MODES:
        raise _invalid(source, f"contains an unknown sslmode: use one of {', '.join(SSL_MODES)}")
    return lowered


def _flag(text: str | None) -> bool:
    return text is not None and text.strip().lower() in _TRUE


def _query(query: str, source: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=bool(query), errors="strict"
        )
    except ValueError:
        raise _invalid(source, "contains a query that is not name=value&name=value") from None
    return {key: value for key, value in pairs if value}


def _unquote(text: str, source: str) -> str:
    try:
        plain = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise _invalid(source, "contains a %-escape that is not UTF-8") from None
    if "\0" in plain:
        raise _invalid(source, "contains %00, which PostgreSQL does not accept")
    return plain


def _invalid(source: str, what: str) -> SettingsError:
    return SettingsError(
        f"{source}: the address {what}; expected postgresql://user:password@host:5432/database", variables=[source]
    )


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
