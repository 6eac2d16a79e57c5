"""Where the database is: every form of address that hosts and libpq users have, made into one `ConnectTarget`.

Precedence, first one set wins (an empty value counts as not set):

1. `DATABASE_URL` (with `DATABASE_UNPOOLED_URL` beside it: the former goes through a pooler, the latter does not);
2. `DATABASE_UNPOOLED_URL` alone;
3. `PGHOST`, `PGPORT`, `PGUSER`, `PGPASSWORD`, `PGDATABASE`, `PGSSLMODE`, when `PGHOST` is set;
4. `DB_HOST`, `DB_PORT`, `DB_USER`, `DB_PASSWORD`, `DB_NAME`, `DB_SSL`, when `DB_HOST` is set;
5. `DATABASE_PUBLIC_URL`;
6. nothing: the embedded server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote

from utils.database.target import DEFAULT_PORT, SSL_MODES, ConnectTarget
from utils.exceptions import SettingsError

_SCHEMES = ("postgres", "postgresql", "postgresql+asyncpg")
#: Files and switches of TLS that asyncpg reads from a URL, as libpq does (PostgreSQL manual, 34.1.2).
_TLS_OPTIONS = frozenset(
    {"sslrootcert", "sslcert", "sslkey", "sslcrl", "sslpassword", "sslnegotiation"}
    | {"ssl_min_protocol_version", "ssl_max_protocol_version"}
)
_DRIVER_OPTIONS = frozenset({"target_session_attrs", "krbsrvname", "gsslib", "passfile", "service", "servicefile"})
#: What other drivers read from a URL, and asyncpg would send to the server as a setting that it does not know.
_IGNORED = frozenset(
    {"connect_timeout", "connection_limit", "channel_binding", "gssencmode", "gssdelegation", "client_encoding"}
    | {"keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout", "hostaddr"}
    | {"load_balance_hosts", "require_auth", "requirepeer", "sslcompression", "sslsni", "sslcertmode"}
    | {"fallback_application_name", "pool_timeout", "schema", "async_fallback"}
    | {"statement_cache_size", "prepared_statement_cache_size"}
)
_TRUE = frozenset(("1", "true", "yes", "on"))
_FALSE = frozenset(("0", "false", "no", "off"))


def resolve(values: Any) -> ConnectTarget | None:
    """Return where `values` (a `Settings`, or a mapping of variables) say the database is; None: embedded.

    Raises `SettingsError`, which names the variable and what is wrong with it but never shows the value of a URL.
    """
    get = _reader(values)
    url, unpooled = get("DATABASE_URL"), get("DATABASE_UNPOOLED_URL")
    if url:
        pooled = unpooled is not None and unpooled != url
        return parse(url, source="DATABASE_URL", pooled=pooled)
    if unpooled:
        return parse(unpooled, source="DATABASE_UNPOOLED_URL")
    for prefix, ssl in (("PG", "PGSSLMODE"), ("DB_", "DB_SSL")):
        target = _from_parts(get, prefix, ssl)
        if target is not None:
            return target
    public = get("DATABASE_PUBLIC_URL")
    return parse(public, source="DATABASE_PUBLIC_URL") if public else None


def resolve_direct(values: Any) -> ConnectTarget | None:
    """Return the way around a pooler, for migrations, LISTEN and pg_dump; None when `resolve` is direct already."""
    get = _reader(values)
    url, unpooled = get("DATABASE_URL"), get("DATABASE_UNPOOLED_URL")
    if url and unpooled and url != unpooled:
        return parse(unpooled, source="DATABASE_UNPOOLED_URL")
    return None


def parse(url: str, *, source: str = "DATABASE_URL", pooled: bool = False) -> ConnectTarget:
    """Take a URL apart. Raises `SettingsError`; neither it nor its message ever holds a password."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(#.*)?\Z", url.strip(), re.DOTALL)
    if match is None or match[1].lower() not in _SCHEMES:
        raise _wrong(source, "begins with none of postgres://, postgresql://, postgresql+asyncpg://")
    authority, path, query, fragment = match[2], match[3], match[4] or "", match[5]
    if fragment or "@" in path or ("@" in query and "@" not in authority):
        raise _wrong(source, "has a '/', '?' or '#' in its user or password: write %2F, %3F, %23 instead")
    userinfo, _, hosts_text = authority.rpartition("@")
    raw_user, _, raw_password = userinfo.partition(":")
    options = _query(query, source)

    def from_either(option: str, text: str) -> str | None:
        return options.pop(option, None) or _unquote(text, source) or None

    user, password = from_either("user", raw_user), from_either("password", raw_password)
    database = options.pop("dbname", None) or from_either("database", path.removeprefix("/"))
    ports_text, host_option = options.pop("port", None), options.pop("host", None)
    if host_option:  # wins over the address's own, as in libpq: postgres://user@localhost/db?host=/cloudsql/name
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


def _reader(values: Any) -> Any:
    """Return a function from a variable's name to its text, or None where it is not set."""
    table = values if isinstance(values, Mapping) else values.connection_values()

    def get(name: str) -> str | None:
        value = table.get(name)
        if value is None:
            return None
        secret = getattr(value, "get_secret_value", None)
        text = str(secret() if secret is not None else value).strip()
        return text or None

    return get


def _from_parts(get: Any, prefix: str, ssl_variable: str) -> ConnectTarget | None:
    name = "PGDATABASE" if prefix == "PG" else "DB_NAME"
    host = get(f"{prefix}HOST")
    if host is None:
        # PGUSER or PGPASSWORD alone are common in shells; DB_NAME alone can only be meant for us.
        if prefix == "DB_" and (get("DB_NAME") or get("DB_USER") or get("DB_PASSWORD")):
            raise SettingsError("DB_HOST: not set although other DB_* are: name the server, or remove them")
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
        elif part.startswith("/") or part.count(":") > 1:
            host, port = part, None  # a socket's directory, or an IPv6 address from PGHOST, which has no brackets
        else:
            host, _, port = part.partition(":")
        host = _unquote(host, source) if quoted else host
        if not _is_host(host):
            raise _wrong(source, "has no readable host name in it")
        hosts.append(host)
        ports.append(_port(port, source) if port else None)
    given = [_port(text.strip(), source) if text.strip() else DEFAULT_PORT for text in (ports_text or "").split(",")]
    if len(given) not in (1, len(hosts)):
        raise _wrong(source, f"names {len(hosts)} hosts but {len(given)} ports: give one port, or one for each")
    given = given * len(hosts) if len(given) == 1 else given
    return tuple(hosts), tuple(port or given[index] for index, port in enumerate(ports))


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
        # The text is not shown: behind an unencoded '/' in a password it would be the password's beginning.
        raise _wrong(source, "has a port that is no number from 1 to 65535 (is a '/' in the password not %2F?)")
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
        raise _wrong(source, f"asks for an sslmode that does not exist: use one of {', '.join(SSL_MODES)}")
    return lowered


def _flag(text: str | None) -> bool:
    return text is not None and text.strip().lower() in _TRUE


def _query(query: str, source: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=bool(query), errors="strict"
        )
    except ValueError:
        raise _wrong(source, "has something after its '?' that is not name=value&name=value") from None
    return {key: value for key, value in pairs if value}


def _unquote(text: str, source: str) -> str:
    try:
        plain = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise _wrong(source, "has a %-escape in it that is not UTF-8") from None
    if "\0" in plain:
        raise _wrong(source, "has a %00 in it, which PostgreSQL takes nowhere")
    return plain


def _wrong(source: str, what: str) -> SettingsError:
    return SettingsError(f"{source}: the address {what}; expected postgresql://user:password@host:5432/database")
