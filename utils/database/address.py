"""From an address, such as the value of `DATABASE_URL`, to the `ConnectTarget` that bot and commands connect to.

`resolve_targets` reads every form of address that hosts and libpq use; settings call it once. `open_target` starts the
embedded server where there is no address. Precedence, the first that is set wins (an empty value counts as not set):

1. `DATABASE_URL` (with `DATABASE_UNPOOLED_URL` beside it, the former is pooled and the latter is the direct address);
2. `DATABASE_UNPOOLED_URL` alone;
3. `PGHOST`, `PGPORT`, `PGUSER`, `PGPASSWORD`, `PGDATABASE`, `PGSSLMODE`, when `PGHOST` is set;
4. `DB_HOST`, `DB_PORT`, `DB_USER`, `DB_PASSWORD`, `DB_NAME`, `DB_SSL`, when `DB_HOST` is set;
5. `DATABASE_PUBLIC_URL`;
6. nothing: the embedded server.

`DATABASE_PUBLIC_URL` replaces `DATABASE_URL` where the host of the latter cannot be resolved: a private network's name
outside that network.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from pydantic import SecretStr

from utils.database.embedded import START_SECONDS, STOP_SECONDS, EmbeddedServer
from utils.database.placement import check_schema
from utils.database.target import ConnectTarget
from utils.exceptions import SettingsError

DEFAULT_PORT = 5432
#: libpq's, weakest first (PostgreSQL manual, 34.19).
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_SCHEMES = ("postgres", "postgresql", "postgresql+asyncpg")
#: TLS parameters that asyncpg reads from a DSN, as libpq does (PostgreSQL manual, 34.1.2).
_TLS_OPTIONS = frozenset(
    {"sslrootcert", "sslcert", "sslkey", "sslcrl", "sslpassword", "sslnegotiation"}
    | {"ssl_min_protocol_version", "ssl_max_protocol_version"}
)
_DRIVER_OPTIONS = frozenset({"target_session_attrs", "krbsrvname", "gsslib", "passfile", "service", "servicefile"})
#: Parameters of libpq, hosts and other drivers that mean nothing to us. They are ignored, and named in the log.
_IGNORED = frozenset(
    {"connect_timeout", "channel_binding", "gssencmode", "gssdelegation", "client_encoding", "hostaddr"}
    | {"keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"}
    | {"load_balance_hosts", "require_auth", "requirepeer", "sslcompression", "sslsni", "sslcertmode", "sslkeylogfile"}
    | {"min_protocol_version", "max_protocol_version", "fallback_application_name"}
    | {"connection_limit", "pool_timeout", "socket_timeout", "max_idle_connection_lifetime"}  # Prisma
    | {"statement_cache_size", "prepared_statement_cache_size", "async_fallback", "pool_size", "max_overflow"}
    | {"pool_max_conns", "pool_min_conns", "default_query_exec_mode", "statement_cache_capacity", "preparethreshold"}
    | {"supa", "workaround", "conn_max_age", "sslidentity"}
)
#: Settings of PostgreSQL that an address may set directly; any other one is written `options=-c name=value`.
_SERVER_SETTINGS = frozenset(
    {"application_name", "options", "search_path", "role", "timezone", "datestyle", "intervalstyle", "work_mem"}
    | {"statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout"}
    | {"transaction_timeout", "maintenance_work_mem", "temp_buffers", "jit", "default_tablespace", "temp_tablespaces"}
    | {"default_transaction_isolation", "default_transaction_read_only", "default_transaction_deferrable"}
    | {"synchronous_commit", "extra_float_digits", "bytea_output", "client_min_messages", "row_security"}
    | {"tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "client_connection_check_interval"}
    | {"log_statement", "log_min_duration_statement", "random_page_cost", "effective_cache_size", "plan_cache_mode"}
    | {"max_parallel_workers_per_gather", "session_replication_role", "standard_conforming_strings"}
)
#: The port of the transaction mode of Supabase's pooler, and what the names of Neon's pooled hosts contain.
_POOLER_PORT, _POOLER_HOST = 6543, "-pooler."
#: What the names of hosts in the private networks of Railway and Fly end with.
_PRIVATE_SUFFIX = ".internal"
#: Where Linux distributions and macOS keep the system's certificates, if Python does not know.
_SYSTEM_CERTIFICATES = (
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)  # fmt: skip
_TRUE = frozenset(("1", "true", "yes", "on"))
_FALSE = frozenset(("0", "false", "no", "off"))


def can_resolve(host: str) -> bool:
    """Return whether the name of a host has an address here. Blocks."""
    try:
        return bool(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError):
        return False


def resolve_targets(
    values: Mapping[str, SecretStr | str | None], *, can_resolve: Callable[[str], bool] = can_resolve
) -> tuple[ConnectTarget | None, ConnectTarget | None]:
    """Return the target and the direct target that these variables name; None, None: the embedded server.

    The direct target bypasses a pooler, for migrations, LISTEN and pg_dump. Without a pooler it equals the target.
    `can_resolve` is asked only when there is both a private and a public address.
    Raises `SettingsError`, which names the variable and what is wrong with it but never shows the value of a URL.
    """
    get = _reader(values)
    target, direct = _with_schema(*_resolve(get, can_resolve), get("DB_SCHEMA"))
    for one in (target, direct):
        if one is not None:
            one.check_files()
    return target, direct


@contextlib.asynccontextmanager
async def open_target(
    target: ConnectTarget | None,
    data_dir: Path | str,
    *,
    schema: str | None,
    start_timeout: float = START_SECONDS,
    stop_timeout: Callable[[], float] = lambda: STOP_SECONDS,
) -> AsyncIterator[ConnectTarget]:
    """Yield `target`; if it is None, yield the embedded server's, which runs under `data_dir` during the block.

    `schema` is that of the tables in the embedded server's database; `target` has its own.
    `stop_timeout` is called when the block ends and returns how many seconds the stop may take.
    """
    if target is not None:
        yield target
        return
    server = EmbeddedServer(data_dir)
    await server.start(start_timeout)
    try:
        yield replace(server.target(), schema=schema)
    finally:
        await server.stop(stop_timeout())


def _with_schema(
    target: ConnectTarget | None, direct: ConnectTarget | None, schema: str | None
) -> tuple[ConnectTarget | None, ConnectTarget | None]:
    """Return both with the same schema: that of DB_SCHEMA or, without it, that of an address."""
    if schema is not None and (problem := check_schema(schema)):
        raise SettingsError(f"DB_SCHEMA: {schema[:70]!r}: {problem}", variables=["DB_SCHEMA"])
    if target is None or direct is None:
        return target, direct
    if schema is None and target.schema and direct.schema and target.schema != direct.schema:
        raise SettingsError(
            f"{direct.source}: its schema is {direct.schema!r}, but that of {target.source} is {target.schema!r}: use"
            " one for both, or set DB_SCHEMA",
            variables=[direct.source],
        )
    schema = schema or target.schema or direct.schema
    return replace(target, schema=schema), replace(direct, schema=schema)


def _resolve(
    get: Callable[[str], str | None], can_resolve: Callable[[str], bool]
) -> tuple[ConnectTarget | None, ConnectTarget | None]:
    url, unpooled, public = get("DATABASE_URL"), get("DATABASE_UNPOOLED_URL"), get("DATABASE_PUBLIC_URL")
    if url and unpooled and url != unpooled:
        target = parse_url(url, source="DATABASE_URL", pooled=True)
        direct = parse_url(unpooled, source="DATABASE_UNPOOLED_URL")
        if public and not _has_address(target, can_resolve):
            target = direct = _public_instead(target, public)
        return target, direct
    if url or unpooled:
        source = "DATABASE_URL" if url else "DATABASE_UNPOOLED_URL"
        private = parse_url(url or unpooled or "", source=source)
        if public and not _has_address(private, can_resolve):
            private = _public_instead(private, public)
        return private, private
    parts = _from_parts(get, "PG", "PGSSLMODE") or _from_parts(get, "DB_", "DB_SSL")
    if public and parts is None:
        parts = parse_url(public, source="DATABASE_PUBLIC_URL")
    elif public and parts is not None and not _has_address(parts, can_resolve):
        parts = _public_instead(parts, public)
    return parts, parts


def _has_address(target: ConnectTarget, can_resolve: Callable[[str], bool]) -> bool:
    """Return whether a host is public, or private and has an address here."""
    return not target.hosts or any(not host.endswith(_PRIVATE_SUFFIX) or can_resolve(host) for host in target.hosts)


def _public_instead(private: ConnectTarget, public: str) -> ConnectTarget:
    target = parse_url(public, source="DATABASE_PUBLIC_URL")
    note = (
        f"{private.source}: the host {', '.join(private.hosts)} cannot be resolved from here: using DATABASE_PUBLIC_URL"
    )
    return replace(target, notes=(note, *target.notes))


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

    if not hosts and (address := options.pop("hostaddr", None)):
        hosts, ports = _hosts(address.split(","), ports_text, source)
    sslmode = _sslmode(options.pop("sslmode", None) or options.pop("ssl", None), source)
    for understood in ("ssl", "uselibpqcompat"):  # the latter asks for libpq's meaning of sslmode, which is ours
        options.pop(understood, None)
    tls = {key: options.pop(key) for key in sorted(_TLS_OPTIONS & options.keys())}
    if (options.pop("sslaccept", "").lower()) == "strict" and sslmode not in ("disable", "verify-full"):  # Prisma
        sslmode = "verify-full"
        tls.setdefault("sslrootcert", "system")
    sslmode = _with_system_certificates(tls, sslmode, source)
    schema = options.pop("schema", None)  # Prisma's spelling
    if schema is not None and (problem := check_schema(schema)):
        raise _invalid(source, f"has a schema that {problem}")
    declared = options.pop("pgbouncer", None)
    is_hinted = _is_pooler(hosts, ports) or "pooler" in options.get("supa", "") + options.get("workaround", "")
    driver = {key: options.pop(key) for key in sorted(_DRIVER_OPTIONS & options.keys())}
    ignored = [key for key in options if key.lower() in _IGNORED]
    settings = {key: value for key, value in options.items() if key not in ignored}
    for key in settings:
        _check_setting(key, source, may_show="@" not in query)
    return ConnectTarget(
        hosts=hosts,
        ports=ports,
        user=user,
        password=password,
        database=database,
        sslmode=sslmode,
        tls=tls,
        driver=driver,
        server_settings=settings,
        pooled=pooled or (is_hinted if declared is None else _flag(declared)),
        is_declared=pooled or declared is not None,
        schema=schema,
        source=source,
        notes=(f"{source}: ignored what other programs understand: {', '.join(ignored)}",) if ignored else (),
    )


def _check_setting(name: str, source: str, *, may_show: bool) -> None:
    """Raise `SettingsError` for a parameter that is neither known nor a setting of PostgreSQL."""
    if name.lower() in _SERVER_SETTINGS or re.fullmatch(r"enable_[a-z_]+|[A-Za-z_]\w*\.[A-Za-z_][\w.]*", name):
        return
    # After an unescaped '?' in the password a name could be a part of it.
    shown = f" {name!r}" if may_show and re.fullmatch(r"[A-Za-z_]\w{0,62}", name) else ""
    raise _invalid(
        source,
        f"contains an unknown parameter{shown}: remove it, or write a setting of PostgreSQL as"
        " options=-c%20name%3Dvalue",
    )


def _with_system_certificates(tls: dict[str, str], sslmode: str | None, source: str) -> str | None:
    """Replace `sslrootcert=system` by the system's file, and return the mode.

    It implies `verify-full`, as in libpq.
    """
    if sslmode == "disable":
        return sslmode
    if tls.get("sslrootcert") == "system":
        found = system_certificates()
        if found is None:
            raise _invalid(
                source, "has sslrootcert=system, but this system has no certificates: install ca-certificates"
            )
        tls["sslrootcert"], sslmode = found, "verify-full"
    return sslmode


def system_certificates() -> str | None:
    """Return the file with the certificates that this system trusts; None if there is none."""
    paths = ssl.get_default_verify_paths()
    candidates = (paths.cafile, paths.openssl_cafile, *_SYSTEM_CERTIFICATES)
    return next((path for path in candidates if path and os.path.isfile(path)), None)


def _reader(values: Mapping[str, SecretStr | str | None]) -> Callable[[str], str | None]:
    """Return a function that maps a variable's name to its text; None when it is not set."""

    def get(name: str) -> str | None:
        value = values.get(name)
        if value is None:
            return None
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        return (text if name.endswith("PASSWORD") else text.strip()) or None

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
    sslmode, tls = _sslmode(get(ssl_variable), ssl_variable), {}
    authorities = os.environ.get("PGSSLROOTCERT")
    if prefix == "PG" and authorities and sslmode in ("require", "verify-ca", "verify-full"):
        tls["sslrootcert"] = authorities  # asyncpg reads it too, but does not know "system"
        sslmode = _with_system_certificates(tls, sslmode, "PGSSLROOTCERT")
    return ConnectTarget(
        hosts=hosts,
        ports=ports,
        user=get(f"{prefix}USER"),
        password=get(f"{prefix}PASSWORD"),
        database=get(name),
        sslmode=sslmode,
        tls=tls,
        pooled=_is_pooler(hosts, ports),
        source=source,
    )


def _is_pooler(hosts: tuple[str, ...], ports: tuple[int, ...]) -> bool:
    """Return whether host or port look like a pooler's."""
    return any(_POOLER_HOST in host for host in hosts) or (
        _POOLER_PORT in ports and not any(host.startswith("/") for host in hosts)
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
        if socket_file := re.fullmatch(r"(/.*)/\.s\.PGSQL\.(\d{1,5})", host):
            host, port = socket_file[1], port or socket_file[2]  # libpq takes the directory only
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
    if lowered == "no-verify":  # node-postgres: encrypted, unverified
        return "require"
    if lowered in _FALSE:
        return "disable"
    if lowered not in SSL_MODES:
        raise _invalid(source, f"contains an unknown sslmode: use one of {', '.join(SSL_MODES)}")
    return lowered


def _flag(text: str | None) -> bool:
    return text is not None and text.strip().lower() in _TRUE


def _query(query: str, source: str) -> dict[str, str]:
    query = "&".join(filter(None, query.split("&")))  # some hosts' addresses end with '&'
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
