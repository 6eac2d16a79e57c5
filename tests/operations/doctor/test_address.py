"""The doctor names poolers, ignored parameters and the peculiarities of hosts."""

from __future__ import annotations

import socket

import pytest

from tests.database.pooler import needs_pgbouncer, pgbouncer
from tests.operations.doctor.test_doctor import worst_findings
from utils.database import ConnectTarget
from utils.database.address import parse_url
from utils.operations.doctor.address import describe_host, find_unreachable
from utils.settings import variables

SUPABASE = parse_url("postgresql://postgres@db.abcdefghijklmnop.supabase.co/postgres")
NEON = parse_url("postgresql://u@ep-cool-darkness-123456.eu-central-1.aws.neon.tech/d?sslmode=require")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in variables():
        monkeypatch.delenv(name, raising=False)


@needs_pgbouncer
async def test_names_an_unannounced_pooler(monkeypatch: pytest.MonkeyPatch, target: ConnectTarget) -> None:
    async with pgbouncer(target) as behind:
        found = await worst_findings(monkeypatch, "address", DATABASE_URL=behind.libpq_url())
    assert found["pooler"].state == "warn"
    assert "is a pooler: transaction mode is assumed" in found["pooler"].seen
    assert "DATABASE_UNPOOLED_URL" in found["pooler"].todo


async def test_lists_ignored_parameters(monkeypatch: pytest.MonkeyPatch, target: ConnectTarget) -> None:
    url = target.libpq_url() + "&connection_limit=5&supa=x"
    found = await worst_findings(monkeypatch, "address", DATABASE_URL=url)
    assert found["address"].seen == "DATABASE_URL: ignored what other programs understand: connection_limit, supa"
    assert found["pooler"].state == "ok"


def test_names_supabases_ipv6_only_host() -> None:
    (finding,) = find_unreachable(SUPABASE, has_route=lambda *_: False)
    assert finding.state == "fail"
    assert "IPv6 address only" in finding.seen
    assert "Session pooler" in finding.todo
    assert find_unreachable(SUPABASE, has_route=lambda _, family: family == socket.AF_INET6) == []
    assert find_unreachable(NEON, has_route=lambda *_: False) == []


def test_names_neons_suspend_and_wake_up() -> None:
    (finding,) = describe_host(NEON, 60.0)
    assert (finding.state, "suspends" in finding.seen) == ("ok", True)
    (finding,) = describe_host(NEON, 3.0)
    assert finding.state == "warn"
    assert "DB_CONNECT_TIMEOUT" in finding.todo
    assert describe_host(SUPABASE, 3.0) == []
