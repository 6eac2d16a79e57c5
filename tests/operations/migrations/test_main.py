"""`python -m utils.operations.migrations`: what `make lint` runs."""

from __future__ import annotations

import pytest

from utils.operations.migrations import __main__

pytestmark = pytest.mark.slow


def test_squawk_accepts_our_sql() -> None:
    assert __main__.main(["lint"]) == 0


def test_squawk_rejects_blocking_sql() -> None:
    assert __main__.lint("CREATE INDEX i ON members (nick);\n") == 1


async def test_check_reports_drift_from_the_models() -> None:
    assert await __main__.check(18) == []
    lines = await __main__.check(18, role_membership="CREATE VIEW role_membership AS SELECT 1 AS one")
    assert any("view role_membership" in line for line in lines)
