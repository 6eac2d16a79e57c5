"""Settings from the environment and `.env`, validated once at the start."""

from __future__ import annotations

import base64
import binascii
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from utils import packs
from utils.database.address import resolve_targets
from utils.database.target import ConnectTarget
from utils.exceptions import SettingsError

#: Where to get a token.
DEVELOPER_PORTAL = "https://discord.com/developers/applications"
#: Discord's (API reference, "API Versioning").
DISCORD_API_BASE = "https://discord.com/api/v10"
#: Names that a pack cannot have: those of Guildbook's own cogs.
RESERVED_NAMES = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "cogs").glob("[!_]*.py")))
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_SECRETS = frozenset(
    (
        "DISCORD_TOKEN", "DATABASE_URL", "DATABASE_UNPOOLED_URL", "DATABASE_PUBLIC_URL", "PGPASSWORD", "DB_PASSWORD",
        "BACKUP_URL", "BACKUP_SIGNING_KEY",
        "BACKUP_AGE_RECIPIENT",  # the secret identity is easily mistaken for the recipient
    )
)  # fmt: skip

#: The addresses of databases, of which only passwords are secret.
_ADDRESSES = ("database_url", "database_unpooled_url", "database_public_url")
#: Values that are never changed: not stripped, and `${NAME}` in `.env` is part of them.
_VERBATIM = frozenset(("PGPASSWORD", "DB_PASSWORD"))
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}")

#: The variables that say where the database is.
TARGET_VARIABLES = (
    "DATABASE_URL", "DATABASE_UNPOOLED_URL", "DATABASE_PUBLIC_URL",
    "PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGSSLMODE",
    "DB_HOST", "DB_PORT", "DB_USER", "DB_PASSWORD", "DB_NAME", "DB_SSL", "DB_SCHEMA",
)  # fmt: skip

Snowflake = Annotated[int, Field(gt=0, lt=2**63)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65_535)]
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def _seconds(value: Any) -> Any:
    """Convert 90, 90s, 5m, 6h, 1d or 2w to seconds, and `off` to None."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("off", "0", "no", "false", "never"):
        return None
    found = re.fullmatch(r"(\d{1,9})\s*([smhdw]?)", text)
    if found is None:
        raise ValueError("a time like 300, 5m, 6h or 1d, or off")
    return int(found[1]) * _UNITS[found[2] or "s"]


#: At least a minute: more frequent backups would never stop running.
Duration = Annotated[float, Field(ge=60, le=366 * 86_400)]


class _DotEnvFile(DotEnvSettingsSource):
    """`.env`, where `${NAME}` stands for another variable only if there is one, and never in a password."""

    def _read_env_file(self, file_path: Path) -> Mapping[str, str | None]:
        from dotenv import dotenv_values

        raw = dotenv_values(file_path, encoding="utf-8", interpolate=False)
        known = {**raw, **os.environ}

        def expand(found: re.Match[str]) -> str:
            return known.get(found[1]) or found[0]

        return {
            name.lower(): value if name.upper() in _VERBATIM else _REFERENCE.sub(expand, value)
            for name, value in raw.items()
            if value
        }


class Settings(BaseSettings):
    """Every setting. The variable has the name of the field in upper case."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, case_sensitive=False, env_file_encoding="utf-8"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments, then the environment, then `.env`."""
        assert isinstance(dotenv_settings, DotEnvSettingsSource)
        return init_settings, env_settings, _DotEnvFile(settings_cls, env_file=dotenv_settings.env_file)

    discord_token: SecretStr | None = Field(
        default=None,
        description=(
            "The bot's token: https://discord.com/developers/applications > your application > Bot > Reset Token."
            " Not needed for `make demo`."
        ),
    )
    cogs: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description=(
            "Packs to load, separated by commas: paths of repositories, which have a slash, or names of installed"
            " packages. `python bot.py new pack NAME` writes one."
        ),
    )
    discord_api_base: str = Field(
        default=DISCORD_API_BASE, description="Base URL of Discord's REST API. Only for proxies and tests."
    )
    discord_gateway_url: str | None = Field(
        default=None,
        description="URL of the gateway. Without it, the answer of GET /gateway/bot. Only for proxies and tests.",
    )
    admin_user_ids: Annotated[frozenset[Snowflake], NoDecode] = Field(
        default=frozenset(),
        description=(
            "User ids of people who may operate the bot besides the application's owner or team, separated by commas or"
            " spaces."
        ),
    )
    admin_guild_id: Snowflake | None = Field(
        default=None,
        description="The guild where the operators' commands are registered. Without it, direct messages with the bot.",
    )

    database_url: SecretStr | None = Field(
        default=None,
        description=(
            "postgres://, postgresql:// or postgresql+asyncpg://; ?sslmode=, ?sslrootcert= and unix sockets"
            " (?host=/run/postgresql) as in libpq. Write @ / ? # in the password as %40 %2F %3F %23."
        ),
    )
    database_unpooled_url: SecretStr | None = Field(
        default=None,
        description=(
            "An address that bypasses a pooler such as PgBouncer in transaction mode, for migrations and notifications."
            " When it is set, DATABASE_URL is assumed to be pooled."
        ),
    )
    database_public_url: SecretStr | None = Field(
        default=None,
        description=(
            "Railway's public address of the database. Read last, and instead of a private address whose host"
            " (*.internal) cannot be resolved."
        ),
    )
    pghost: str | None = Field(default=None, description="Host or socket directory. The PG* variables need it.")
    pgport: str | None = Field(default=None, description="Port, or one for each host of PGHOST.")
    pguser: str | None = Field(default=None, description="User.")
    pgpassword: SecretStr | None = Field(default=None, description="Password.")
    pgdatabase: str | None = Field(default=None, description="Name of the database. Without it, the name of the user.")
    pgsslmode: str | None = Field(
        default=None, description="disable, allow, prefer, require, verify-ca or verify-full."
    )
    db_host: str | None = Field(
        default=None, description="Host, for hosts that set DB_* instead of PG*. The other DB_* variables here need it."
    )
    db_port: str | None = Field(default=None, description="Port.")
    db_user: str | None = Field(default=None, description="User.")
    db_password: SecretStr | None = Field(default=None, description="Password.")
    db_name: str | None = Field(default=None, description="Name of the database.")
    db_ssl: str | None = Field(default=None, description="true, false, or a mode as for PGSSLMODE.")
    db_schema: str | None = Field(
        default=None,
        description=(
            "Schema of the tables, for a database that other programs use too; the bot's own tables are in <name>_ops"
            " (public: ops). Created by the first migration. Without it, ?schema=<name> in the address or the"
            " search_path of the user decides."
        ),
    )
    db_pool_min: int = Field(default=1, ge=0, le=1_000, description="Connections that are kept open.")
    # A reconcile writes users and members side by side, and one connection is for transactions and sessions of cogs.
    db_pool_max: int = Field(
        default=10,
        ge=3,
        le=1_000,
        description=(
            "Maximum number of connections, those of DB_TRANSACTION_CONNECTIONS included. The lease and the"
            " notifications use one more each. All clients of the server share its max_connections."
        ),
    )
    db_transaction_connections: int | None = Field(
        default=None,
        ge=1,
        le=1_000,
        description=(
            "How many of DB_POOL_MAX are for transactions and sessions of cogs; at least two must be left for"
            " statements and the mirror. Without it, half."
        ),
    )
    db_transaction_timeout: Seconds = Field(
        default=2.0,
        description=(
            "How long a transaction or session of a cog waits for one of these connections, in seconds, in the order of"
            " asking. Discord expects an answer within 3."
        ),
    )
    db_connect_timeout: Seconds = Field(
        default=60.0, description="How long to retry connecting at the start, in seconds."
    )
    db_command_timeout: Seconds = Field(default=60.0, description="Timeout of one statement, in seconds.")
    db_acquire_timeout: Seconds = Field(
        default=30.0, description="How long to wait for a free connection of the pool, in seconds."
    )
    db_pool_idle_seconds: float = Field(
        default=300.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="How long a connection may be idle before it is closed, in seconds; 0: for ever.",
    )
    db_retry_seconds: Seconds = Field(
        default=0.2,
        description=(
            "Delay before the first retry of what failed because the database was unreachable or busy, in seconds. It"
            " doubles each time."
        ),
    )
    db_retry_max_seconds: Seconds = Field(
        default=5.0, description="Longest delay between two such retries, in seconds."
    )
    db_retry_attempts: int = Field(
        default=5,
        ge=1,
        le=1_000,
        description=(
            "How often functions of cogs marked with @retrying are attempted. The mirror's own writes are retried until"
            " they succeed."
        ),
    )
    data_dir: Path = Field(
        default=Path(".data"),
        description=(
            "Directory of the embedded server's data and other persistent files. On Railway with a volume: guildbook/"
            " on that volume."
        ),
    )
    auto_migrate: bool = Field(
        default=True, description="Whether to migrate the schema to the newest revision at the start."
    )

    cache_max_results: int = Field(
        default=2_000, ge=0, le=1_000_000, description="Maximum number of cached query results of cogs; 0: no cache."
    )
    cache_ttl_seconds: Seconds = Field(default=300.0, description="How long a query result may be cached, in seconds.")
    command_timeout_seconds: float = Field(
        default=60.0,
        ge=0,
        le=14 * 60,
        description=(
            "How long a command, button, menu or form of a cog may leave its user without an answer, or the database"
            " busy, in seconds; then it is given up and rolled back. 0: no limit."
        ),
    )
    slow_query_ms: int = Field(
        default=500, ge=1, le=3_600_000, description="Statements of cogs that take longer are logged, in milliseconds."
    )
    environment: Literal["development", "production"] = Field(
        default="production",
        description=(
            "production or development. In development every statement of cogs is logged, and python bot.py db reset"
            " needs no --yes-destroy."
        ),
    )
    stats_seconds: Seconds = Field(default=300.0, description="Interval of the statistics in the log, in seconds.")

    intents: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description=(
            "Gateway intents besides those of the mirror and of the cogs, by discord.py's names, separated by commas:"
            " message_content, dm_messages, guild_reactions, ...; default and all are what discord.py calls so."
        ),
    )
    command_prefix: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description=(
            "Prefixes of text commands, separated by spaces. A mention of the bot always works. In guilds a prefix"
            " needs the intent message_content."
        ),
    )
    help_command: Literal["none", "default", "minimal"] = Field(
        default="none",
        description="discord.py's help command for text commands: none, default or minimal. A cog may set its own.",
    )
    message_cache: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description=(
            "How many messages discord.py keeps in memory, for cogs that listen for on_message_edit, on_reaction_add"
            " and the like; 0: none. The events on_raw_... need none."
        ),
    )
    member_cache: Literal["none", "voice", "all"] = Field(
        default="none",
        description=(
            "Which members discord.py keeps in memory, for cogs that need them: none; voice: those in voice channels;"
            " all: filled from the mirror's listings and kept up to date, about 1.5 KB a member. The mirror needs none."
        ),
    )
    events_from_mirror: bool = Field(
        default=False,
        description=(
            "Whether on_member_update, on_member_remove and on_user_update come from the mirror, for every member and"
            " once the change is committed, instead of from discord.py, which knows changes of members in memory only."
        ),
    )
    flush_rows: int = Field(
        default=500, ge=1, le=100_000, description="Number of buffered rows after which live changes are written."
    )
    flush_seconds: Seconds = Field(
        default=1.0, description="Seconds after which live changes are written at the latest."
    )
    buffer_max_rows: int = Field(
        default=15_000,
        ge=100,
        le=10_000_000,
        description=(
            "Maximum number of rows and events in memory, 1 to 2 KB each. Beyond it events go to the spool, and members"
            " are dropped until the next reconcile restores them."
        ),
    )
    spool: Literal["outage", "always", "off"] = Field(
        default="outage",
        description=(
            "When to write events that Discord sends only once (joins, leaves, counted messages) to a journal under"
            " DATA_DIR/spool. outage: when the database is unreachable; always: before anything else, so that even a"
            " kill -9 loses none; off: never."
        ),
    )
    spool_max_mb: int = Field(
        default=1_024,
        ge=1,
        le=1_000_000,
        description=(
            "Maximum size of the spool, in megabytes. Each table that cogs write in batches may take as much again."
        ),
    )
    chunk_timeout_seconds: Seconds = Field(
        default=10.0, description="How long to wait for a page of members before the request fails, in seconds."
    )
    chunk_cooldown_seconds: float = Field(
        default=30.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description=(
            "Seconds between two full member requests for one guild, as Discord requires. Change it for tests and"
            " proxies only."
        ),
    )
    shutdown_seconds: Seconds = Field(
        default=25.0,
        description=(
            "How long a clean shutdown may take, in seconds. Stay below the host's own limit (Railway: set"
            " RAILWAY_DEPLOYMENT_DRAINING_SECONDS=30)."
        ),
    )

    backup_every: Duration | None = Field(
        default=None,
        description="Interval of scheduled backups: seconds, or a value such as 5m, 6h or 1d; off: none.",
    )
    drill_every: Duration | None = Field(
        default=None,
        description=(
            "Interval of scheduled drills, which restore the newest backup into scratch tables, written as"
            " BACKUP_EVERY; off: none."
        ),
    )
    backup_keep: int = Field(default=10, ge=1, le=100_000, description="Number of newest backups to keep.")
    backup_keep_daily: int = Field(
        default=7, ge=0, le=10_000, description="Days for which the last backup is kept besides those."
    )
    backup_keep_weekly: int = Field(
        default=4, ge=0, le=10_000, description="Weeks for which the last backup is kept besides those."
    )
    backup_keep_monthly: int = Field(
        default=12, ge=0, le=10_000, description="Months for which the last backup is kept besides those."
    )
    backup_url: SecretStr | None = Field(
        default=None,
        description=(
            "A second store for backups besides DATA_DIR/backups: s3://bucket/path, gs://bucket/path,"
            " az://container/path or file:///path. Keys and endpoints come from the store's own variables"
            " (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)."
        ),
    )
    backup_age_recipient: str | None = Field(
        default=None,
        description="The age recipient to encrypt backups to, as printed by age-keygen. Without it, no encryption.",
    )
    backup_age_identity_file: Path | None = Field(
        default=None,
        description="File with the matching age identity. Only restores and drills need it: store it elsewhere.",
    )
    backup_signing_key: SecretStr | None = Field(
        default=None,
        description=(
            "A secret to sign the manifests of backups with (HMAC-SHA256). With it, a backup is refused that was made"
            " or changed by somebody who can write to the store, but does not have the key."
        ),
    )
    recover: Literal["off", "auto"] = Field(
        default="off",
        description=(
            "What a bot does on an empty database of which there is a good backup of the same application, host and"
            " database: off: it waits until an operator says restore or begin anew; auto: it restores the newest one."
        ),
    )
    import_json: Path | None = Field(
        default=None,
        description="Directory of JSON files (members.json, users.json, ...) that the first start imports, once.",
    )

    port: Port | None = Field(
        default=None,
        description=(
            "Port of GET /healthz, /readyz and /metrics, as hosts set it; it overrides HEALTH_PORT. 0: any free port."
        ),
    )
    health_port: Port | None = Field(
        default=None, description="The same port, when the host sets none. Without both there is no health server."
    )
    health_host: str | None = Field(
        default=None, description="Address of the health server. Without it, every address, IPv4 and IPv6."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto, console or json. auto: console on a terminal, JSON lines elsewhere."
    )
    log_level: str = Field(default="INFO", description="DEBUG, INFO, WARNING, ERROR or CRITICAL.")
    railway_volume_mount_path: Path | None = Field(
        default=None,
        description=(
            "Set by Railway when the service has a volume. Any other RAILWAY_* variable without it disables the"
            " embedded server, because the next deployment would lose its data."
        ),
    )
    on_railway: bool = Field(
        default=False, exclude=True, description="Whether this runs on Railway: any RAILWAY_* variable is set."
    )
    #: What `resolve_targets` returned; None before `target` or `direct_target` is first read.
    _targets: tuple[ConnectTarget | None, ConnectTarget | None] | None = PrivateAttr(default=None)

    @field_validator("*", mode="before")
    @classmethod
    def _strip(cls, value: Any, info: ValidationInfo) -> Any:
        is_verbatim = str(info.field_name).upper() in _VERBATIM
        return value.strip() if isinstance(value, str) and not is_verbatim else value

    @field_validator("data_dir", "backup_age_identity_file", "import_json", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("a path; empty, it would mean the current directory")
        return value

    @field_validator("admin_user_ids", mode="before")
    @classmethod
    def _split_ids(cls, value: Any) -> Any:
        return [part for part in re.split(r"[\s,;]+", value) if part] if isinstance(value, str) else value

    @field_validator("cogs", mode="before")
    @classmethod
    def _split_entries(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("log_level", mode="after")
    @classmethod
    def _known_level(cls, value: str) -> str:
        level = {"WARN": "WARNING", "FATAL": "CRITICAL"}.get(value.upper(), value.upper())
        if level not in _LOG_LEVELS:
            raise ValueError(f"one of {', '.join(_LOG_LEVELS)}")
        return level

    @field_validator("backup_every", "drill_every", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        return _seconds(value)

    @field_validator("backup_age_recipient", mode="after")
    @classmethod
    def _recipient(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"age1[02-9ac-hj-np-z]{58}", value):
            raise ValueError("an age recipient as age-keygen prints it: age1 and 58 more letters and digits")
        return value

    @field_validator("intents", mode="before")
    @classmethod
    def _intent_names(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        from discord import Intents  # only those who set it pay for the import

        names = tuple(dict.fromkeys(re.split(r"[,\s]+", value.strip(" ,").lower())))
        known = ("default", "all", *Intents.VALID_FLAGS)
        for name in names:
            if name not in known:
                similar = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"names of discord.py's intents ({name!r}: did you mean {similar[0]}?)"
                    if similar
                    else f"names of discord.py's intents, of which {name!r} is none: {', '.join(Intents.VALID_FLAGS)}"
                )
        return names

    @field_validator("command_prefix", mode="before")
    @classmethod
    def _prefixes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        prefixes = tuple(dict.fromkeys(value.split()))
        if any(re.search(r"^[\"'].*[\"']$|[^,],[^,]|\[.*\]", prefix) for prefix in prefixes):
            raise ValueError("prefixes separated by spaces, without quotes, commas or brackets: ! ?")
        return prefixes

    @field_validator("member_cache", "log_format", "spool", "environment", "recover", "help_command", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("discord_api_base", "discord_gateway_url", mode="after")
    @classmethod
    def _address(cls, value: str | None, info: Any) -> str | None:
        schemes = ("http", "https") if info.field_name == "discord_api_base" else ("ws", "wss")
        expected = f"an address that begins with {schemes[1]}:// or {schemes[0]}://"
        if value is None:
            return None
        try:
            parts = urlsplit(value)
        except ValueError:
            raise ValueError(expected) from None
        if parts.scheme not in schemes or not parts.hostname:
            raise ValueError(expected)
        return value.rstrip("/")

    @field_validator("discord_token", mode="after")
    @classmethod
    def _token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        text = value.get_secret_value().removeprefix("Bot ").strip()
        if not text.isascii() or re.search(r"[\s\"'`]", text):
            raise ValueError("the token as the developer portal shows it, without spaces or quotes")
        return SecretStr(text)

    @property
    def effective_health_port(self) -> int | None:
        """The port of the health server: PORT, otherwise HEALTH_PORT. 0: any free port; None: no server."""
        return self.port if self.port is not None else self.health_port

    @property
    def application_id(self) -> int | None:
        """The application of the token, which its first part tells; None without a token or if it does not."""
        token = "" if self.discord_token is None else self.discord_token.get_secret_value()
        return application_of_token(token)

    @property
    def orm_connections(self) -> int:
        """How many of DB_POOL_MAX are for transactions and sessions of cogs; the others are for the raw pool."""
        if self.db_transaction_connections is not None:
            return self.db_transaction_connections
        return min(self.db_pool_max // 2, self.db_pool_max - 2)

    @property
    def target(self) -> ConnectTarget | None:
        """The database, perhaps behind a pooler; None: the embedded server. Resolved once, by `load_settings`."""
        return self._resolved_targets()[0]

    @property
    def direct_target(self) -> ConnectTarget | None:
        """The database without a pooler, for migrations, LISTEN and pg_dump; None: the embedded server."""
        return self._resolved_targets()[1]

    def _resolved_targets(self) -> tuple[ConnectTarget | None, ConnectTarget | None]:
        if self._targets is None:
            self._targets = resolve_targets({name: getattr(self, name.lower()) for name in TARGET_VARIABLES})
        return self._targets

    def with_data_dir(self, data_dir: Path | None) -> Settings:
        """Return a copy that uses the embedded server under `data_dir` and no other database; None: no change."""
        if data_dir is None:
            return self
        copied = self.model_copy(update={"data_dir": data_dir})
        copied._targets = None, None
        return copied

    def secrets(self) -> list[str]:
        """Return every secret value, including the passwords inside URLs, to be redacted from the logs.

        The name of a store of backups is not secret, only a login and a query in its URL; neither is the address of a
        database without its passwords. A password that is also the name of the user, the database or PostgreSQL's own
        user is left out: it would hide that name wherever it occurs, which would tell what the password is.
        """
        values: list[str] = []
        for name, value in self:
            if isinstance(value, SecretStr):
                find = _secret_parts if name == "backup_url" else _passwords if name in _ADDRESSES else None
                text = value.get_secret_value()
                values += [text] if find is None else find(text)
        targets = [target for target in self._resolved_targets() if target is not None]
        values += [target.password for target in targets if target.password]
        names = {"postgres", *(name for target in targets for name in (target.user, target.database))}
        return [value for value in values if value not in names]


def _secret_parts(url: str) -> list[str]:
    """Return what is secret in the URL of a store: a password, a query, and the URL with them."""
    try:
        parts = urlsplit(url)
        found = [part for part in (parts.password, parts.query) if part]
    except ValueError:
        return [url]
    return [url, *found] if found or parts.username else []


def _passwords(url: str) -> list[str]:
    """Return what is secret in the address of a database: its passwords, and the address with them."""
    try:
        parts = urlsplit(url)
        found = [parts.password, *(value for name, value in parse_qsl(parts.query) if "password" in name.lower())]
    except ValueError:
        return [url]
    passwords = [part for part in found if part]
    # What is no address, or has an @ in a login that is not one, may be anything.
    is_plain = bool(parts.scheme) and not passwords and "password" not in url.lower() and "@" not in parts.path
    return [] if is_plain else [url, *passwords, *(unquote(one) for one in passwords)]


def application_of_token(token: str) -> int | None:
    """Return the id of the application that a bot's token is of; None if its first part is not one in base64."""
    first = token.partition(".")[0]
    try:
        digits = base64.b64decode(first + "=" * (-len(first) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        return None
    return int(digits) if re.fullmatch(r"\d{17,20}", digits) and 0 < int(digits) < 2**63 else None


def variables() -> list[str]:
    """Return the name of every variable."""
    return [name.upper() for name in Settings.model_fields if name != "on_railway"]


def load_settings(env_file: str | Path | None = ".env") -> Settings:
    """Read the environment and, for variables that it does not set, `env_file` (None or a missing file: no file).

    The packs that `COGS` names become those of this process.

    Raises `SettingsError` with one line for each wrong value: the variable, the value unless it is secret, and what is
    expected.
    """
    # Other empty variables are as good as not set. An empty directory is one that something else should have named.
    if any(name.upper() == "DATA_DIR" and not value.strip() for name, value in os.environ.items()):
        raise SettingsError(
            "DATA_DIR: it is empty; expected the path of a directory, or no such variable for .data in the current one",
            variables=["DATA_DIR"],
        )
    try:
        settings = Settings(_env_file=env_file)  # type: ignore[call-arg]
    except ValidationError as exc:
        errors = exc.errors()
        raise SettingsError("\n".join(map(_line, errors)), variables=[*map(_variable, errors)]) from None
    except UnicodeDecodeError:
        raise SettingsError(f"{env_file}: not a text file in UTF-8; copy .env.example again") from None
    except OSError as exc:
        raise SettingsError(f"{env_file}: cannot be read: {exc.strerror}") from None
    update: dict[str, Any] = {"on_railway": any(name.startswith("RAILWAY_") for name in os.environ)}
    if settings.railway_volume_mount_path is not None and "data_dir" not in settings.model_fields_set:
        update["data_dir"] = settings.railway_volume_mount_path / "guildbook"
    settings = settings.model_copy(update=update)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    wrong: dict[str, str] = {}
    try:
        packs.activate(settings.cogs, taken=RESERVED_NAMES)
    except SettingsError as exc:
        wrong["COGS"] = str(exc)
    if settings.db_retry_seconds > settings.db_retry_max_seconds:
        wrong["DB_RETRY_SECONDS"] = (
            f"DB_RETRY_SECONDS: {settings.db_retry_seconds:g} must not exceed DB_RETRY_MAX_SECONDS"
            f" ({settings.db_retry_max_seconds:g})"
        )
    if settings.db_pool_min > settings.db_pool_max:
        wrong["DB_POOL_MIN"] = (
            f"DB_POOL_MIN: {settings.db_pool_min} must not exceed DB_POOL_MAX ({settings.db_pool_max})"
        )
    if settings.orm_connections > settings.db_pool_max - 2:
        wrong["DB_TRANSACTION_CONNECTIONS"] = (
            f"DB_TRANSACTION_CONNECTIONS: {settings.orm_connections} must leave two of DB_POOL_MAX"
            f" ({settings.db_pool_max}) to statements and the mirror"
        )
    try:
        embedded = settings.target is None
    except SettingsError as exc:
        wrong |= dict.fromkeys(exc.variables or ("DATABASE_URL",), str(exc))
        embedded = False
    if embedded and settings.on_railway and settings.railway_volume_mount_path is None:
        wrong["DATABASE_URL"] = (
            "DATABASE_URL: not set, and this Railway service has no volume, so the next deployment would lose the"
            " embedded database; expected DATABASE_URL=${{Postgres.DATABASE_URL}}, or a volume with DATA_DIR on it"
        )
    elif embedded and settings.railway_volume_mount_path is not None:
        volume, data = settings.railway_volume_mount_path.resolve(), settings.data_dir.resolve()
        if data != volume and volume not in data.parents:
            wrong["DATA_DIR"] = (
                f"DATA_DIR: {settings.data_dir} is not on the volume, so the next deployment would lose the embedded"
                f" database; expected DATA_DIR={volume}/guildbook"
            )
    if wrong:
        raise SettingsError("\n".join(dict.fromkeys(wrong.values())), variables=[*wrong])


_EXPECTED = {
    "bool_parsing": "true or false",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number of seconds",
    "finite_number": "a number of seconds",
}


def _variable(error: Any) -> str:
    return str(error["loc"][0]).upper() if error["loc"] else "settings"


def _line(error: Any) -> str:
    variable = _variable(error)
    kind, context = str(error["type"]), error.get("ctx") or {}
    bounds = {"greater_than": "more than", "greater_than_equal": "at least", "less_than": "less than"}
    bounds["less_than_equal"] = "at most"
    if kind in bounds:
        expected = f"{bounds[kind]} {next(iter(context.values()))}"
    elif kind == "literal_error":
        expected = f"one of {context['expected']}"
    elif kind == "value_error":
        expected = str(context.get("error", error["msg"]))
    else:
        expected = _EXPECTED.get(kind, str(error["msg"]))
    if variable in ("ADMIN_USER_IDS", "ADMIN_GUILD_ID"):
        expected = "Discord ids, digits only (Developer Mode on, right-click, Copy ID)"
    seen = "" if variable in _SECRETS else f" {str(error['input'])[:100]!r} is wrong;"
    return f"{variable}:{seen} expected {expected}"
