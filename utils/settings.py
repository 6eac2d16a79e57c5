"""What operators set: the environment and `.env`, validated once at the start."""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from utils.database.target import ConnectTarget, resolve_targets
from utils.exceptions import SettingsError

#: Where a token comes from, for the message that says it is missing.
DEVELOPER_PORTAL = "https://discord.com/developers/applications"
#: Discord's (API reference, "API Versioning").
DISCORD_API_BASE = "https://discord.com/api/v10"
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_SECRETS = frozenset(
    (
        "DISCORD_TOKEN", "DATABASE_URL", "DATABASE_UNPOOLED_URL", "DATABASE_PUBLIC_URL", "PGPASSWORD", "DB_PASSWORD",
        "BACKUP_URL", "BACKUP_AGE_RECIPIENT",  # the identity is easily taken for the recipient
    )
)  # fmt: skip

#: The variables that say where the database is.
TARGET_VARIABLES = (
    "DATABASE_URL", "DATABASE_UNPOOLED_URL", "DATABASE_PUBLIC_URL",
    "PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGSSLMODE",
    "DB_HOST", "DB_PORT", "DB_USER", "DB_PASSWORD", "DB_NAME", "DB_SSL",
)  # fmt: skip

Snowflake = Annotated[int, Field(gt=0, lt=2**63)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65_535)]
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def _seconds(value: Any) -> Any:
    """Read 90, 90s, 5m, 6h, 1d or 2w as seconds; `off` is None."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("off", "0", "no", "false", "never"):
        return None
    found = re.fullmatch(r"(\d{1,9})\s*([smhdw]?)", text)
    if found is None:
        raise ValueError("a time like 300, 5m, 6h or 1d, or off")
    return int(found[1]) * _UNITS[found[2] or "s"]


#: At least a minute: a backup that is always under way keeps nothing else from working, but is of no use either.
Duration = Annotated[float, Field(ge=60, le=366 * 86_400)]


class Settings(BaseSettings):
    """Every setting; the variable's name is the field's in capitals. Times are seconds."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, case_sensitive=False, env_file_encoding="utf-8"
    )

    #: None: the bot cannot log in.
    discord_token: SecretStr | None = None
    discord_api_base: str = DISCORD_API_BASE
    #: None: GET /gateway/bot says it.
    discord_gateway_url: str | None = None
    #: Who may operate the bot beside the application's owner or team.
    admin_user_ids: Annotated[frozenset[Snowflake], NoDecode] = frozenset()
    #: Where the operators' commands are registered; None: in direct messages with the bot.
    admin_guild_id: Snowflake | None = None

    database_url: SecretStr | None = None
    database_unpooled_url: SecretStr | None = None
    database_public_url: SecretStr | None = None
    pghost: str | None = None
    pgport: str | None = None
    pguser: str | None = None
    pgpassword: SecretStr | None = None
    pgdatabase: str | None = None
    pgsslmode: str | None = None
    db_host: str | None = None
    db_port: str | None = None
    db_user: str | None = None
    db_password: SecretStr | None = None
    db_name: str | None = None
    db_ssl: str | None = None
    db_pool_min: int = Field(default=1, ge=0, le=1_000)
    #: At least 3: a reconcile writes users and members side by side, and one is for transactions and sessions of cogs.
    db_pool_max: int = Field(default=10, ge=3, le=1_000)
    #: How long to keep trying at the start.
    db_connect_timeout: Seconds = 60.0
    db_command_timeout: Seconds = 60.0
    #: The embedded server's data, and other files that have to last.
    data_dir: Path = Path(".data")
    auto_migrate: bool = True

    #: Results of cogs' queries that are kept; 0: none.
    cache_max_results: int = Field(default=2_000, ge=0, le=1_000_000)
    cache_ttl_seconds: Seconds = 300.0
    #: Milliseconds from which a cog's statement is logged as slow.
    slow_query_ms: int = Field(default=500, ge=1, le=3_600_000)
    #: development: every statement of cogs is logged, and `db reset` may be used.
    environment: Literal["development", "production"] = "production"
    #: How often a line of statistics is logged.
    stats_seconds: Seconds = 300.0

    member_cache: Literal["none", "voice", "all"] = "none"
    flush_rows: int = Field(default=500, ge=1, le=100_000)
    flush_seconds: Seconds = 1.0
    #: Rows and events that may wait in memory.
    buffer_max_rows: int = Field(default=15_000, ge=100, le=10_000_000)
    #: When events go to the journal on disk.
    spool: Literal["outage", "always", "off"] = "outage"
    #: Megabytes that journals may take on disk.
    spool_max_mb: int = Field(default=1_024, ge=1, le=1_000_000)
    #: The pause before the next try when the database cannot take rows, doubled each time up to the second figure.
    db_retry_seconds: Seconds = 0.2
    db_retry_max_seconds: Seconds = 5.0
    #: How long a page of members may be awaited.
    chunk_timeout_seconds: Seconds = 10.0
    #: Discord's own bound between two full member requests of a guild; anything else is for tests and proxies.
    chunk_cooldown_seconds: float = Field(default=30.0, ge=0, le=86_400, allow_inf_nan=False)
    #: How long a clean end may take after a signal.
    shutdown_seconds: Seconds = 25.0

    #: Seconds between two scheduled backups; None: there are none. Written 300, 5m, 6h or 1d.
    backup_every: Duration | None = None
    #: Seconds between two scheduled drills; None: there are none.
    drill_every: Duration | None = None
    #: The newest backups that are kept, and of older ones the last of so many days, weeks and months.
    backup_keep: int = Field(default=10, ge=1, le=100_000)
    backup_keep_daily: int = Field(default=7, ge=0, le=10_000)
    backup_keep_weekly: int = Field(default=4, ge=0, le=10_000)
    backup_keep_monthly: int = Field(default=12, ge=0, le=10_000)
    #: Where backups go beside DATA_DIR/backups: s3://, gs://, az:// or file://, as obstore reads it; None: nowhere.
    backup_url: SecretStr | None = None
    #: The age recipient (age1…) whom backups are encrypted to; None: they are not.
    backup_age_recipient: str | None = None
    #: The file with the identity that belongs to it, for restores and drills; None: an encrypted one is not readable.
    backup_age_identity_file: Path | None = None
    #: A directory of JSON files that the first start imports, once; None: none.
    import_json: Path | None = None

    #: Wins over `health_port`: hosts set it.
    port: Port | None = None
    #: None: no health server; 0: any free port.
    health_port: Port | None = None
    #: None: every address, IPv4 and IPv6.
    health_host: str | None = None
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: str = "INFO"
    railway_volume_mount_path: Path | None = None
    #: Whether this runs on Railway: any variable that begins with RAILWAY_ is set.
    on_railway: bool = Field(default=False, exclude=True)

    @field_validator("*", mode="before")
    @classmethod
    def _strip(cls, value: Any) -> Any:
        return value.strip() if isinstance(value, str) else value

    @field_validator("admin_user_ids", mode="before")
    @classmethod
    def _split_ids(cls, value: Any) -> Any:
        return [part for part in re.split(r"[\s,;]+", value) if part] if isinstance(value, str) else value

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

    @field_validator("member_cache", "log_format", "spool", "environment", mode="before")
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
        if not text.isascii() or re.search(r"\s", text):
            raise ValueError("the token as the developer portal shows it, without spaces or quotes")
        return SecretStr(text)

    @property
    def effective_health_port(self) -> int | None:
        """The port of the health server: PORT before HEALTH_PORT; 0: any free one; None: there is no server."""
        return self.port if self.port is not None else self.health_port

    @property
    def orm_connections(self) -> int:
        """Connections of DB_POOL_MAX for transactions and sessions of cogs; the pool of raw ones has the others."""
        return max(1, self.db_pool_max * 3 // 10)

    @property
    def target(self) -> ConnectTarget | None:
        """The database, perhaps behind a pooler; None: the embedded server. Resolved once, by `load_settings`."""
        return self._targets[0]

    @property
    def direct_target(self) -> ConnectTarget | None:
        """The database without a pooler, for migrations, LISTEN and pg_dump; None: the embedded server."""
        return self._targets[1]

    @cached_property
    def _targets(self) -> tuple[ConnectTarget | None, ConnectTarget | None]:
        return resolve_targets({name: getattr(self, name.lower()) for name in TARGET_VARIABLES})

    def with_data_dir(self, data_dir: Path | None) -> Settings:
        """Return a copy that uses the embedded server under `data_dir` and no other database; None: no change."""
        if data_dir is None:
            return self
        copied = self.model_copy(update={"data_dir": data_dir})
        copied.__dict__["_targets"] = (None, None)
        return copied

    def secrets(self) -> list[str]:
        """Return every secret value, including the passwords inside database URLs, to be redacted from the logs."""
        values = [value.get_secret_value() for _, value in self if isinstance(value, SecretStr)]
        return values + [target.password for target in self._targets if target is not None and target.password]


def variables() -> list[str]:
    """Return the name of every variable that is read."""
    return [name.upper() for name in Settings.model_fields if name != "on_railway"]


def load_settings(env_file: str | Path | None = ".env") -> Settings:
    """Read the environment and, for what it does not set, `env_file` (None: no file; one that is missing is none).

    Raises `SettingsError` with one line for each wrong value: the variable, what was seen unless it is secret, and
    what is expected.
    """
    try:
        settings = Settings(_env_file=env_file)  # type: ignore[call-arg]
    except ValidationError as exc:
        errors = exc.errors()
        raise SettingsError("\n".join(map(_line, errors)), variables=[*map(_variable, errors)]) from None
    except UnicodeDecodeError:
        raise SettingsError(f"{env_file}: not a text file in UTF-8; write it anew from .env.example") from None
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
    if settings.db_retry_seconds > settings.db_retry_max_seconds:
        wrong["DB_RETRY_SECONDS"] = (
            f"DB_RETRY_SECONDS: {settings.db_retry_seconds:g} is more than DB_RETRY_MAX_SECONDS"
            f" ({settings.db_retry_max_seconds:g}); expected no more"
        )
    if settings.db_pool_min > settings.db_pool_max:
        wrong["DB_POOL_MIN"] = (
            f"DB_POOL_MIN: {settings.db_pool_min} is more than DB_POOL_MAX ({settings.db_pool_max}); expected no more"
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
