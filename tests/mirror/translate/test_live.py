"""Dispatches become rows, memberships and messages to count."""

from __future__ import annotations

from typing import Any

import pytest

from utils.mirror.translate.live import parse_message


def message(**fields: Any) -> dict[str, Any]:
    return {"id": "3", "guild_id": "1", "author": {"id": "2"}} | fields


@pytest.mark.parametrize("kind", [0, 19, 20, 21, 23])
def test_counts_messages_that_somebody_wrote(kind: int) -> None:
    counted = parse_message(message(type=kind), 9)
    assert counted is not None
    assert tuple(counted) == (9, 1, 2, 3)


@pytest.mark.parametrize("kind", [1, 6, 7, 8, 12, 18, 22, 24, 46, 999])
def test_does_not_count_system_messages(kind: int) -> None:
    assert parse_message(message(type=kind), 9) is None


def test_counts_neither_direct_messages_nor_webhooks() -> None:
    assert parse_message({"id": "3", "author": {"id": "2"}}, 9) is None
    assert parse_message(message(webhook_id="4"), 9) is None
