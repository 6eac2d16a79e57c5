"""Every form of address is parsed, and no text contains the password."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
from asyncpg.connect_utils import _parse_connect_dsn_and_args  # type: ignore[attr-defined]
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from utils.database import ConnectTarget
from utils.database.address import parse_url, resolve_targets
from utils.exceptions import SettingsError

PASSWORD = "s3cr3t-p/a:s@s?w#rd%"
QUOTED = "s3cr3t-p%2Fa%3As%40s%3Fw%23rd%25"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg", "POSTGRES"])
def test_accepts_all_schemes(scheme: str) -> None:
    target = parse_url(f"{scheme}://amy:{QUOTED}@db.example.net:6000/guilds")
    assert (target.hosts, target.ports) == (("db.example.net",), (6000,))
    assert (target.user, target.password, target.database) == ("amy", PASSWORD, "guilds")


def test_accepts_an_unescaped_at_sign() -> None:
    target = parse_url("postgresql://amy:p@ss@h/d")
    assert (target.user, target.password, target.hosts) == ("amy", "p@ss", ("h",))


@pytest.mark.parametrize(
    ("url", "hosts", "ports"),
    [
        ("postgresql://u@h/d", ("h",), (5432,)),
        ("postgresql://u@[::1]:6000/d", ("::1",), (6000,)),
        ("postgresql://u@[fd12::1]/d", ("fd12::1",), (5432,)),
        ("postgresql:///d?host=/run/postgresql", ("/run/postgresql",), (5432,)),
        ("postgresql:///d?host=/run/postgresql&port=6000", ("/run/postgresql",), (6000,)),
        ("postgresql://u@%2Frun%2Fpostgresql/d", ("/run/postgresql",), (5432,)),
        ("postgresql://u@%2Frun%2Fpostgresql:6000/d", ("/run/postgresql",), (6000,)),
        (
            "postgresql://u:p@localhost/d?host=/cloudsql/project:region:name",
            ("/cloudsql/project:region:name",),
            (5432,),
        ),
        ("postgresql://u@a:1,b:2,c/d", ("a", "b", "c"), (1, 2, 5432)),
        ("postgresql://u@/d?host=a,b&port=1,2", ("a", "b"), (1, 2)),
        ("postgresql:///d", (), ()),
    ],
)
def test_parses_hosts_like_libpq(url: str, hosts: tuple[str, ...], ports: tuple[int, ...]) -> None:
    target = parse_url(url)
    assert (target.hosts, target.ports, target.database) == (hosts, ports, "d")


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"])
def test_passes_every_sslmode_to_asyncpg(mode: str, tmp_path: Path) -> None:
    authority = tmp_path / "root.crt"
    authority.write_text(CERTIFICATE)
    target = parse_url(f"postgresql://u:{QUOTED}@h/d?sslmode={mode}&sslrootcert={authority}")
    _, params = _read_by_asyncpg(target)
    assert params.sslmode.name == mode.replace("-", "_")
    assert bool(params.ssl) == (mode != "disable")
    if mode == "verify-full":
        assert params.ssl.check_hostname
        assert params.ssl.get_ca_certs()
    assert (params.user, params.password, params.database) == ("u", PASSWORD, "d")


def test_a_missing_certificate_error_hides_the_password() -> None:
    target = parse_url(f"postgresql://u:{QUOTED}@h/d?sslmode=verify-full&sslrootcert=/nowhere.crt")
    with pytest.raises((asyncpg.ClientConfigurationError, OSError)) as caught:
        _read_by_asyncpg(target)
    assert PASSWORD not in str(caught.value)


def test_ignores_options_of_other_drivers() -> None:
    target = parse_url("postgresql://u@h/d?connect_timeout=10&channel_binding=require&sslmode=require&supa=x")
    assert target.connect_kwargs()["server_settings"] == {"application_name": "guildbook"}


def test_passes_server_settings() -> None:
    target = parse_url("postgresql://u@h/d?application_name=mine&options=-c%20search_path%3Dx&work_mem=64MB")
    assert target.connect_kwargs()["server_settings"] == {
        "application_name": "mine",
        "options": "-c search_path=x",
        "work_mem": "64MB",
    }
    assert "work_mem%3D64MB" in target.libpq_url()


def test_precedence() -> None:
    values = {
        "DATABASE_URL": "postgresql://u@first/d",
        "PGHOST": "second",
        "DB_HOST": "third",
        "DATABASE_PUBLIC_URL": "postgresql://u@fourth/d",
    }
    seen = []
    for name in list(values):
        target = resolve(values)
        assert target is not None
        seen.append(target.hosts[0])
        values[name] = "  "
    assert seen == ["first", "second", "third", "fourth"]
    assert resolve(values) is None


def test_reads_pg_and_db_variables() -> None:
    pg = resolve(
        {
            "PGHOST": "h",
            "PGPORT": "6000",
            "PGUSER": "u",
            "PGPASSWORD": PASSWORD,
            "PGDATABASE": "d",
            "PGSSLMODE": "allow",
        }
    )
    db = resolve(
        {"DB_HOST": "h", "DB_PORT": "6000", "DB_USER": "u", "DB_PASSWORD": PASSWORD, "DB_NAME": "d", "DB_SSL": "true"}
    )
    for target, mode in ((pg, "allow"), (db, "require")):
        assert target is not None
        assert (target.hosts, target.ports, target.user) == (("h",), (6000,), "u")
        assert (target.password, target.database, target.sslmode) == (PASSWORD, "d", mode)


def test_an_unpooled_url_marks_the_other_as_pooled() -> None:
    values = {"DATABASE_URL": "postgresql://u@pooler/d", "DATABASE_UNPOOLED_URL": "postgresql://u@server/d"}
    pooled, direct = resolve_targets(values)
    assert pooled is not None
    assert direct is not None
    assert pooled.pooled
    assert pooled.connect_kwargs()["statement_cache_size"] == 0
    assert "server_settings" not in pooled.connect_kwargs()
    arguments = pooled.sqlalchemy_connect_args()
    assert arguments["prepared_statement_cache_size"] == 0
    assert arguments["prepared_statement_name_func"]() == ""
    assert (direct.hosts, direct.pooled) == (("server",), False)


def test_equal_urls_are_not_pooled() -> None:
    values = dict.fromkeys(("DATABASE_URL", "DATABASE_UNPOOLED_URL"), "postgresql://u@server/d")
    target, direct = resolve_targets(values)
    assert target is not None
    assert not target.pooled
    assert direct == target


def test_a_url_can_declare_a_pooler() -> None:
    assert parse_url("postgresql://u@h:6543/d?pgbouncer=true").pooled


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u@aws-0-eu.example.net:6543/d",
        "postgresql://u@ep-cool-1-pooler.eu.example.net/d",
        "postgresql://u@h/d?supa=base-pooler.x",
        "postgresql://u@h/d?workaround=supabase-pooler.vercel",
    ],
)
def test_recognises_poolers_by_their_address(url: str) -> None:
    target = parse_url(url)
    assert target.pooled
    assert "supa" not in target.connect_kwargs().get("server_settings", {})
    declared = parse_url(f"{url}{'&' if '?' in url else '?'}pgbouncer=false")
    assert (declared.pooled, declared.is_declared) == (False, True)


def test_a_pooler_is_recognised_in_pghost() -> None:
    target = resolve({"PGHOST": "ep-cool-1-pooler.eu.example.net", "PGUSER": "u"})
    assert target is not None
    assert target.pooled


@pytest.mark.parametrize(
    "parameter",
    ["connection_limit=1", "pool_timeout=10", "supa=x", "workaround=y", "hostaddr=10.0.0.1", "channel_binding=require"],
)
def test_says_which_parameters_it_ignores(parameter: str) -> None:
    target = parse_url(f"postgresql://u@h/d?{parameter}")
    name, _, value = parameter.partition("=")
    assert len(target.notes) == 1
    assert name in target.notes[0]
    assert value not in target.notes[0].split(name)[1]
    assert target.connect_kwargs()["server_settings"] == {"application_name": "guildbook"}


@pytest.mark.parametrize(
    ("query", "mode"),
    [
        ("uselibpqcompat=true&sslmode=require", "require"),
        ("sslmode=no-verify", "require"),
        ("sslaccept=accept_invalid_certs&sslmode=require", "require"),
        ("sslaccept=strict&sslmode=require", "verify-full"),
        ("sslmode=require&", "require"),
        ("&sslmode=require&&", "require"),
    ],
)
def test_understands_parameters_of_other_drivers(query: str, mode: str) -> None:
    target = parse_url(f"postgresql://u@h/d?{query}")
    assert target.sslmode == mode
    assert target.notes == ()


def test_a_trailing_ampersand_or_question_mark_is_harmless() -> None:
    assert parse_url("postgresql://u@h/d?&") == parse_url("postgresql://u@h/d?") == parse_url("postgresql://u@h/d")


def test_hostaddr_alone_is_the_host() -> None:
    assert parse_url("postgresql:///d?hostaddr=10.0.0.1&port=6000&user=u").hosts == ("10.0.0.1",)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u@/d?host=/run/postgresql/.s.PGSQL.6000",
        "postgresql://u@%2Frun%2Fpostgresql%2F.s.PGSQL.6000/d",
        "postgresql://u@/d?host=/run/postgresql&port=6000",
    ],
)
def test_accepts_the_file_of_a_socket(url: str) -> None:
    target = parse_url(url)
    assert (target.hosts, target.ports) == (("/run/postgresql",), (6000,))


def test_refuses_unknown_parameters_with_the_variable() -> None:
    with pytest.raises(SettingsError, match=r"^DATABASE_URL: .*'sslmod'") as caught:
        resolve({"DATABASE_URL": "postgresql://u@h/d?sslmod=require"})
    assert caught.value.variables == ("DATABASE_URL",)
    with pytest.raises(SettingsError, match="unknown parameter: ") as caught:
        parse_url("postgresql://u:p@ss?w0rd=1@h/d")
    assert "w0rd" not in str(caught.value)
    assert parse_url("postgresql://u@h/d?my_app.user=1&enable_seqscan=off&TimeZone=UTC").server_settings


def test_sslrootcert_system_is_the_file_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authorities = tmp_path / "system.crt"
    authorities.write_text(CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(authorities))
    target = parse_url("postgresql://u@h/d?sslrootcert=system")
    assert (target.sslmode, target.tls["sslrootcert"]) == ("verify-full", str(authorities))
    _, params = _read_by_asyncpg(target)
    assert params.ssl.check_hostname
    assert params.ssl.get_ca_certs()
    monkeypatch.setenv("PGSSLROOTCERT", "system")
    by_variables = resolve({"PGHOST": "h", "PGUSER": "u", "PGSSLMODE": "verify-full"})
    assert by_variables is not None
    assert by_variables.tls["sslrootcert"] == str(authorities)


@pytest.mark.parametrize("option", ["sslrootcert", "sslcert", "sslkey", "sslcrl"])
def test_a_missing_certificate_file_is_named_at_once(option: str) -> None:
    values = {"DATABASE_URL": f"postgresql://u:{QUOTED}@h/d?sslmode=verify-full&{option}=/nowhere/ca.pem"}
    with pytest.raises(SettingsError, match=f"^DATABASE_URL: {option}: /nowhere/ca.pem cannot be read") as caught:
        resolve(values)
    assert PASSWORD not in str(caught.value)


def test_a_file_without_a_certificate_is_named_at_once(tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.write_text("not a certificate")
    with pytest.raises(SettingsError, match=r"ca\.pem contains no certificate"):
        resolve({"DATABASE_URL": f"postgresql://u@h/d?sslmode=verify-full&sslrootcert={empty}"})


def test_a_user_id_without_a_name_is_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", fail)
    monkeypatch.delenv("PGUSER", raising=False)
    with pytest.raises(SettingsError, match="the address has no user"):
        parse_url("postgresql://h/d").connect_kwargs()
    assert parse_url("postgresql://u@h/d").connect_kwargs()["user"] == "u"


def test_the_public_address_replaces_a_private_one_without_an_address() -> None:
    values = {
        "DATABASE_URL": "postgresql://u@postgres.railway.internal/d",
        "DATABASE_PUBLIC_URL": "postgresql://u@proxy.example.net:12345/d",
    }
    target, direct = resolve_targets(values, can_resolve=lambda _: False)
    assert target is not None
    assert target == direct
    assert (target.hosts, target.source) == (("proxy.example.net",), "DATABASE_PUBLIC_URL")
    assert "postgres.railway.internal cannot be resolved" in target.notes[0]
    target, _ = resolve_targets(values, can_resolve=lambda _: True)
    assert target is not None
    assert (target.hosts, target.notes) == (("postgres.railway.internal",), ())


def test_passwords_keep_their_outer_spaces() -> None:
    for prefix in ("PG", "DB_"):
        target = resolve({f"{prefix}HOST": " h ", f"{prefix}USER": "u", f"{prefix}PASSWORD": " pass "})
        assert target is not None
        assert (target.hosts, target.password) == (("h",), " pass ")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://u:{}@h/d", "does not begin with"),
        ("h/d", "does not begin with"),
        ("postgresql://u:{}@h:port/d", "port"),
        ("postgresql://u:{}@h:70000/d", "port"),
        ("postgresql://u:{}@h/d?sslmode=always", "sslmode"),
        ("postgresql://u:{}@a,b/d?port=1,2,3", "2 hosts but 3 ports"),
        ("postgresql://u:{}@h/d?nonsense", "name=value"),
        ("postgresql://u:12/34@h/d", "%2F"),
        ("postgresql://u:12#34@h/d", "%23"),
        ("postgresql://u:12?34@h/d", "%3F"),
        ("postgresql://u:%FF@h/d", "UTF-8"),
        ("postgresql://u:{}@exa mple/d", "host"),
        ("postgresql://:{}", "host"),
        ("postgresql://a:{}:b", "host"),
        ("postgresql://u:{}@%s/d" % ("x" * 70), "host"),
    ],
)
def test_errors_explain_without_showing_the_url(url: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_url(url.format(QUOTED))
    message = str(caught.value)
    assert message.startswith("DATABASE_URL: ")
    assert says in message
    for secret in (PASSWORD, QUOTED, "12", "34"):
        assert secret not in message.replace("5432", "")


def test_rejects_db_variables_without_db_host() -> None:
    with pytest.raises(SettingsError, match="DB_HOST"):
        resolve({"DB_NAME": "guilds"})


def test_ignores_pguser_without_pghost() -> None:
    assert resolve({"PGUSER": "amy", "PGPASSWORD": PASSWORD}) is None


@pytest.mark.direct("start-up parameters are refused")
async def test_all_forms_reach_the_same_database(target: ConnectTarget) -> None:
    again = parse_url(target.libpq_url())
    for one in (target, again):
        engine = create_async_engine(one.sqlalchemy_url(), connect_args=one.sqlalchemy_connect_args())
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT current_database()"))).scalar() == target.database
        await engine.dispose()
        raw = await asyncpg.connect(**one.connect_kwargs())
        assert await raw.fetchval("SELECT current_setting('application_name')") == "guildbook"
        await raw.close()


secret_text = st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8"), min_size=6, max_size=20).map(
    lambda tail: f"Zq{tail.strip()}9Xk"
)
names = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=10).filter(
    str.strip
)
hosts = st.one_of(
    st.from_regex(r"[a-z][a-z0-9]{0,10}(\.[a-z]{2,5})?", fullmatch=True),
    st.ip_addresses().map(str),
    st.from_regex(r"/[a-z]{1,8}(/[a-z.-]{1,8})?", fullmatch=True),
)
places = st.lists(st.tuples(hosts, st.integers(1, 65_535)), min_size=1, max_size=3).map(
    lambda pairs: zip(*pairs, strict=True)
)
targets = st.builds(
    lambda places, **rest: ConnectTarget(*places, **rest),
    places,
    user=names,
    password=secret_text,
    database=names,
    sslmode=st.sampled_from([None, "disable", "prefer", "verify-full"]),
    source=st.just("DATABASE_URL"),
)


def resolve(values: Mapping[str, str]) -> ConnectTarget | None:
    return resolve_targets(values)[0]


@given(targets)
def test_a_target_round_trips_through_its_url(target: ConnectTarget) -> None:
    back = parse_url(target.libpq_url())
    assert replace(back, password=target.password) == target
    assert target.libpq_environment() == {"PGPASSWORD": target.password}


@given(targets)
def test_no_text_form_contains_the_password(target: ConnectTarget) -> None:
    password = target.password
    assert password is not None
    record = logging.LogRecord("x", 20, "", 1, "%s %r", (target, target), None)
    for shown in (str(target), repr(target), f"{target}", record.getMessage(), repr([target]), repr({"t": target})):
        assert password not in shown


@given(
    secret_text,
    st.text(st.characters(exclude_characters="/"), max_size=5),
    st.sampled_from(["@h:5432/d", "@h/d?sslmode=x", ":x@h/d", "@/", "", "@[h/d"]),
)
def test_no_error_contains_the_password(password: str, user: str, rest: str) -> None:
    shown = ""
    try:
        shown = repr(parse_url(f"postgresql://{user}:{password}{rest}"))
    except SettingsError as exc:
        shown = "".join(traceback.format_exception(exc.with_traceback(None)))
    assert password not in shown
    assert quote(password, safe="") not in shown


def _read_by_asyncpg(target: ConnectTarget):  # type: ignore[no-untyped-def]
    kwargs = target.connect_kwargs()
    given = dict.fromkeys(inspect.signature(_parse_connect_dsn_and_args).parameters)
    return _parse_connect_dsn_and_args(**{**given, **{k: v for k, v in kwargs.items() if k in given}})


# Created for this test with openssl req -x509; the key was deleted.
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBeTCCAR+gAwIBAgIUFpV9wEzZaFrfytBpU7vBNFMwlYAwCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGbm9ib2R5MCAXDTI2MTEyMTAyMjI1M1oYDzIxMjYxMDI4MDIy
MjUzWjARMQ8wDQYDVQQDDAZub2JvZHkwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AAS0EaGhzNNgXvqG1BlCBJeWmxiqhiKmEMuab3ggMqlNV82zouhAwcPsObiEzVTX
A8qndZyo0Pqb00EzAGhfF7wvo1MwUTAdBgNVHQ4EFgQUbxwgmH3LeY0jnGq2imNd
4ViSZDIwHwYDVR0jBBgwFoAUbxwgmH3LeY0jnGq2imNd4ViSZDIwDwYDVR0TAQH/
BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiBUGfKfoeQDXLXdlLIPXvOyPJL2ZGRP
tfPWZ+eukNf2mAIhAM51v/Q1G2fwnLDaGnKblk41SAF4l4yhuB0cfEAcjUQc
-----END CERTIFICATE-----
"""


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("postgresql://amy:pw@DB.example.com/x?sslmode=require", "db.example.com:5432"),
        ("postgresql://bob@db.example.com:5432/y", "db.example.com:5432"),
        ("postgresql://u@a:1,b:2/x", "a:1,b:2"),
        ("postgresql://u@/x?host=/run/postgresql", "/run/postgresql:5432"),
    ],
)
def test_the_location_is_the_server_alone(url: str, location: str) -> None:
    assert parse_url(url).location == location


def test_the_embedded_server_has_one_location() -> None:
    target = ConnectTarget(hosts=("/tmp/somewhere",), ports=(5432,), source="embedded")
    assert target.location == "embedded"
