"""A session factory like the bot's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from utils.database import ConnectTarget
from utils.repositories import SessionFactory

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
async def sessions(target: ConnectTarget) -> AsyncIterator[SessionFactory]:
    """Sessions on a freshly migrated database: leaving the block commits, an exception rolls back."""
    engine = create_async_engine(target.sqlalchemy_url(), connect_args=target.sqlalchemy_connect_args())
    yield async_sessionmaker(engine, expire_on_commit=False).begin
    await engine.dispose()
