"""Settings: defaults, one line for each wrong value, and no secret in any message."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import discord
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.exceptions import SettingsError
from utils.mirror.discord.intents import parse_intents
from utils.settings import Settings, load_settings, variables

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / ".env.example"
TOKEN = "MTIzNDU2Nzg5MDEyMzQ1Njc4.GabcDE.abcdefghijklmnopqrstuvwxyz0123456789AB"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in variables() or name.startswith(("RAILWAY_", "PG", "DB_", "DATABASE_")):
            monkeypatch.delenv(name)


def load(**values: str) -> Settings:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        return load_settings(None)


def refused(**values: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(**values)
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_defaults() -> None:
    settings = load()
    assert settings.discord_token is None
    assert settings.discord_api_base == "https://discord.com/api/v10"
    assert (settings.admin_user_ids, settings.admin_guild_id) == (frozenset(), None)
    assert (settings.data_dir, settings.auto_migrate, settings.member_cache) == (Path(".data"), True, "none")
    assert (settings.db_pool_min, settings.db_pool_max) == (1, 10)
    assert (settings.db_connect_timeout, settings.db_command_timeout) == (60, 60)
    assert (settings.flush_rows, settings.flush_seconds, settings.shutdown_seconds) == (500, 1, 25)
    assert (settings.chunk_timeout_seconds, settings.chunk_cooldown_seconds) == (10, 30)
    assert (settings.effective_health_port, settings.health_host, settings.on_railway) == (None, None, False)
    assert (settings.log_format, settings.log_level) == ("auto", "INFO")


def test_parses_values_as_people_write_them() -> None:
    settings = load(
        DISCORD_TOKEN=f"  Bot {TOKEN} ",
        ADMIN_USER_IDS="80351110224678912, 80351110224678913 80351110224678914;",
        ADMIN_GUILD_ID="197038439483310086",
        AUTO_MIGRATE="no",
        MEMBER_CACHE="Voice",
        LOG_LEVEL="debug",
        LOG_FORMAT="JSON",
        DISCORD_API_BASE="http://127.0.0.1:8080/api/v10/",
        FLUSH_SECONDS="0.25",
        HEALTH_PORT="",
    )
    assert settings.discord_token is not None
    assert settings.discord_token.get_secret_value() == TOKEN
    assert settings.admin_user_ids == {80351110224678912, 80351110224678913, 80351110224678914}
    assert settings.admin_guild_id == 197038439483310086
    assert (settings.auto_migrate, settings.member_cache, settings.log_level) == (False, "voice", "DEBUG")
    assert (settings.log_format, settings.flush_seconds, settings.health_port) == ("json", 0.25, None)
    assert settings.discord_api_base == "http://127.0.0.1:8080/api/v10"


@pytest.mark.parametrize("quote", ['"', "'", "`"])
def test_refuses_quotes_around_a_token(quote: str) -> None:
    message = refused(DISCORD_TOKEN=f"{quote}{TOKEN}{quote}")
    assert message == "DISCORD_TOKEN: expected the token as the developer portal shows it, without spaces or quotes"


@pytest.mark.parametrize("password", ["a${HOME}b", "${NOBODY_SET_THIS}", "  outer spaces ", "$x ${y", "a#b"])
@pytest.mark.parametrize("name", ["DB_PASSWORD", "PGPASSWORD"])
def test_passwords_in_the_file_arrive_as_written(name: str, password: str, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(f"DB_HOST=h\nPGHOST=h\n{name}='{password}'\n")
    read = getattr(load_settings(file), name.lower())
    assert read.get_secret_value() == password


def test_urls_in_the_file_may_refer_to_variables_that_exist(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("SECRET=s3cr3t\nDATABASE_URL='postgresql://u:${SECRET}${NOBODY_SET_THIS}@h/d'\n")
    target = load_settings(file).target
    assert target is not None
    assert target.password == "s3cr3t${NOBODY_SET_THIS}"


def test_pool_and_retry_settings() -> None:
    settings = load(
        DB_ACQUIRE_TIMEOUT="3", DB_POOL_IDLE_SECONDS="0", DB_RETRY_ATTEMPTS="7", DB_RETRY_SECONDS="1",
        DB_RETRY_MAX_SECONDS="2",
    )  # fmt: skip
    assert (settings.db_acquire_timeout, settings.db_pool_idle_seconds, settings.db_retry_attempts) == (3, 0, 7)
    assert (settings.db_retry_seconds, settings.db_retry_max_seconds) == (1, 2)
    assert "DB_RETRY_MAX_SECONDS" in refused(DB_RETRY_SECONDS="9")
    assert "DB_RETRY_ATTEMPTS: '0' is wrong; expected at least 1" in refused(DB_RETRY_ATTEMPTS="0")


def test_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().log_level = "DEBUG"


def test_port_overrides_health_port_and_may_be_zero() -> None:
    assert load(PORT="0", HEALTH_PORT="9000").effective_health_port == 0
    assert load(HEALTH_PORT="9000").effective_health_port == 9000


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ADMIN_USER_IDS", "80351110224678912, me", "Discord ids"),
        ("ADMIN_USER_IDS", "-1", "Discord ids"),
        ("ADMIN_USER_IDS", str(2**63), "Discord ids"),
        ("ADMIN_GUILD_ID", "guild", "Discord ids"),
        ("AUTO_MIGRATE", "perhaps", "true or false"),
        ("MEMBER_CACHE", "some", "'none', 'voice' or 'all'"),
        ("INTENTS", "guilds, mesage_content", "did you mean message_content?"),
        ("INTENTS", "xyz", "none: guilds, members,"),
        ("HELP_COMMAND", "yes", "'none', 'default' or 'minimal'"),
        ("MESSAGE_CACHE", "-1", "at least 0"),
        ("LOG_FORMAT", "xml", "'auto', 'console' or 'json'"),
        ("LOG_LEVEL", "loud", "DEBUG, INFO"),
        ("PORT", "70000", "at most 65535"),
        ("HEALTH_PORT", "http", "a whole number"),
        ("DB_POOL_MAX", "1", "at least 3"),
        ("FLUSH_ROWS", "2.5", "a whole number"),
        ("FLUSH_SECONDS", "soon", "a number of seconds"),
        ("FLUSH_SECONDS", "nan", "a number of seconds"),
        ("SHUTDOWN_SECONDS", "0", "more than 0"),
        ("BACKUP_EVERY", "often", "5m, 6h or 1d"),
        ("BACKUP_EVERY", "59", "at least 60"),
        ("DRILL_EVERY", "5 parsecs", "5m, 6h or 1d"),
        ("DISCORD_API_BASE", "discord.com", "https://"),
        ("DISCORD_GATEWAY_URL", "https://gateway.discord.gg", "wss://"),
        ("DISCORD_GATEWAY_URL", "wss://[", "wss://"),
    ],
)
def test_a_wrong_value_is_one_line(name: str, value: str, expected: str) -> None:
    message = refused(**{name: value})
    assert re.fullmatch(rf"{name}: '.*' is wrong; expected .*", message)
    assert expected in message
    assert value.split(", ")[-1] in message


def test_parses_intervals() -> None:
    wanted = {"300": 300, "90s": 90, "5m": 300, "6 h": 21_600, "1D": 86_400, "2w": 1_209_600, "off": None}
    assert {text: load(BACKUP_EVERY=text).backup_every for text in wanted} == wanted
    assert load().backup_every is None


def test_lists_of_names_and_prefixes() -> None:
    settings = load(INTENTS=" Message_Content,invites  invites, ", COMMAND_PREFIX=" ! !!  ? !")
    assert (settings.intents, settings.command_prefix) == (("message_content", "invites"), ("!", "!!", "?"))
    assert (load().intents, load().command_prefix) == ((), ())
    assert load(COMMAND_PREFIX='hey, ,, " [').command_prefix == ("hey,", ",,", '"', "[")
    assert parse_intents(load(INTENTS="all").intents) == discord.Intents.all()
    assert parse_intents(load(INTENTS="default,members").intents) == discord.Intents.default() | discord.Intents(
        members=True
    )


@pytest.mark.parametrize("value", ['"!"', "'! '?'", "!,?", '["!"]'])
def test_refuses_prefixes_that_are_written_as_in_python(value: str) -> None:
    assert refused(COMMAND_PREFIX=value).endswith("without quotes, commas or brackets: ! ?")


def test_each_wrong_value_has_its_own_line() -> None:
    lines = refused(DB_POOL_MAX="many", LOG_LEVEL="loud", PORT="-1").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["DB_POOL_MAX", "PORT", "LOG_LEVEL"]


def test_rejects_a_pool_minimum_above_the_maximum() -> None:
    assert "DB_POOL_MIN: 5 must not exceed DB_POOL_MAX (3)" in refused(DB_POOL_MIN="5", DB_POOL_MAX="3")
    refusal = refused(DB_TRANSACTION_CONNECTIONS="9", DB_POOL_MAX="10")
    assert "DB_TRANSACTION_CONNECTIONS: 9 must leave two of DB_POOL_MAX (10)" in refusal


@pytest.mark.parametrize(
    "name", ["DISCORD_TOKEN", "DATABASE_URL", "DATABASE_UNPOOLED_URL", "DATABASE_PUBLIC_URL", "BACKUP_AGE_RECIPIENT"]
)
def test_errors_do_not_show_secrets(name: str) -> None:
    message = refused(**{name: "hush hush-5up3r"})
    assert message.startswith(f"{name}: ")
    assert "hush" not in message


def test_no_text_form_contains_a_secret() -> None:
    settings = load(
        DISCORD_TOKEN=TOKEN, DATABASE_URL="postgresql://u:hush-5up3r@h/d", PGPASSWORD="hush-2", DB_PASSWORD="hush-3"
    )
    shown = f"{settings} {settings!r} {settings.model_dump()}"
    shown += settings.model_dump_json()

    assert "hush" not in shown
    assert TOKEN not in shown
    assert {TOKEN, "hush-5up3r", "hush-2", "hush-3"} <= set(settings.secrets())


@pytest.mark.parametrize(
    ("url", "secrets"),
    [
        ("s3://bucket/path", []),
        ("s3://me:hush@bucket/path", ["s3://me:hush@bucket/path", "hush"]),
        ("az://box/path?sig=hush", ["az://box/path?sig=hush", "sig=hush"]),
        ("s3://[hush", ["s3://[hush"]),
    ],
)
def test_the_name_of_a_store_is_not_secret(url: str, secrets: list[str]) -> None:
    assert load(BACKUP_URL=url).secrets() == secrets


@pytest.mark.parametrize(
    ("url", "secrets"),
    [
        ("postgresql:///d?host=/run/postgresql", []),
        ("postgresql://postgres:postgres@h/d", ["postgresql://postgres:postgres@h/d"]),
        ("postgresql://app:bot@h/bot", ["postgresql://app:bot@h/bot"]),
        ("postgresql://me@db.example:5432/d?sslmode=require", []),
        ("postgresql://me:hush%2F5up3r@h/d", ["postgresql://me:hush%2F5up3r@h/d", "hush%2F5up3r", "hush/5up3r"]),
        ("postgresql://h/d?user=me&password=hush%2F", ["postgresql://h/d?user=me&password=hush%2F", "hush/"]),
    ],
)
def test_only_passwords_are_secret_in_addresses(url: str, secrets: list[str]) -> None:
    assert set(load(DATABASE_URL=url).secrets()) == set(secrets)


def test_railway_without_a_volume_needs_a_database_url() -> None:
    message = refused(RAILWAY_ENVIRONMENT_NAME="production")
    assert message.startswith("DATABASE_URL: not set, and this Railway service has no volume")
    assert load(RAILWAY_ENVIRONMENT_NAME="production", DATABASE_URL="postgresql://u@h/d").on_railway


def test_railway_stores_data_on_the_volume() -> None:
    settings = load(RAILWAY_ENVIRONMENT_NAME="production", RAILWAY_VOLUME_MOUNT_PATH="/data")
    assert settings.data_dir == Path("/data/guildbook")
    assert load(RAILWAY_VOLUME_MOUNT_PATH="/data", DATA_DIR="/data/elsewhere").data_dir == Path("/data/elsewhere")
    assert "DATA_DIR: /tmp is not on the volume" in refused(RAILWAY_VOLUME_MOUNT_PATH="/data", DATA_DIR="/tmp")


def test_the_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".env"
    file.write_text("LOG_LEVEL=ERROR\nFLUSH_ROWS=7\nSOMETHING_ELSE=1\n")
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    settings = load_settings(file)
    assert (settings.log_level, settings.flush_rows) == ("DEBUG", 7)


def test_a_binary_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes(b"LOG_LEVEL=\xff\xfe\n")
    with pytest.raises(SettingsError, match="UTF-8"):
        load_settings(file)
    assert load_settings(tmp_path / "missing").log_level == "INFO"


@given(st.sampled_from(variables()), st.text(st.characters(exclude_characters="\0", codec="utf-8")))
def test_no_value_causes_a_traceback(name: str, value: str) -> None:
    with contextlib.suppress(SettingsError):
        load(**{name: value})
        return
    # A wrong part may be reported under a variable that depends on it, or that is missing.
    related = {"D": "DISCORD_|DATABASE_|DATA_DIR|DB_", "P": "PG|PORT", "R": "DATA_DIR|DATABASE_URL"}.get(name[0], name)
    assert re.match(rf"{name}|{related}", refused(**{name: value}))


def test_the_example_contains_exactly_the_settings() -> None:
    named = re.findall(r"^#?([A-Z][A-Z0-9_]*)=", EXAMPLE.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(variables())
    assert len(named) == len(set(named))


def test_the_example_explains_each_setting_with_its_description() -> None:
    blocks = re.findall(r"((?:^# .*\n)+)#?([A-Z][A-Z0-9_]*)=", EXAMPLE.read_text(), re.MULTILINE)
    explained = {name: " ".join(line.removeprefix("# ") for line in text.splitlines()) for text, name in blocks}
    fields = Settings.model_fields
    assert explained == {name: fields[name.lower()].description for name in variables()}


def test_the_example_loads_with_and_without_its_values(tmp_path: Path) -> None:
    assert load_settings(EXAMPLE) == load_settings(None)
    file = tmp_path / ".env"
    file.write_text(re.sub(r"^#([A-Z][A-Z0-9_]*=)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE))
    settings = load_settings(file)
    assert settings.admin_user_ids == {80351110224678912, 80351110224678913}


def test_defaults_in_the_example_are_the_defaults(tmp_path: Path) -> None:
    defaults = load_settings(None)
    names = "DATA_DIR AUTO_MIGRATE MEMBER_CACHE FLUSH_ROWS FLUSH_SECONDS LOG_FORMAT LOG_LEVEL SHUTDOWN_SECONDS"
    names += " DB_POOL_MIN DB_POOL_MAX DB_CONNECT_TIMEOUT DB_COMMAND_TIMEOUT CHUNK_TIMEOUT_SECONDS"
    names += " CHUNK_COOLDOWN_SECONDS DISCORD_API_BASE"
    lines = [line[1:] for line in EXAMPLE.read_text().splitlines() if line[1:].partition("=")[0] in names.split()]
    assert len(lines) == len(names.split())
    file = tmp_path / ".env"
    file.write_text("\n".join(lines))
    assert load_settings(file) == defaults


def test_resolves_the_database_once() -> None:
    settings = load(DATABASE_URL="postgresql://u@pooler/d", DATABASE_UNPOOLED_URL="postgresql://u@server/d")
    assert settings.target is not None
    assert settings.direct_target is not None
    assert settings.target is settings.target
    assert (settings.target.hosts, settings.direct_target.hosts) == (("pooler",), ("server",))
    assert load().target is None


def test_a_data_dir_selects_the_embedded_server() -> None:
    settings = load(DATABASE_URL="postgresql://u@server/d")
    assert settings.with_data_dir(None) is settings
    embedded = settings.with_data_dir(Path("elsewhere"))
    assert (embedded.target, embedded.direct_target, embedded.data_dir) == (None, None, Path("elsewhere"))
    assert settings.target is not None
