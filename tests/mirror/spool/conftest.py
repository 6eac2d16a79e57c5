from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.mirror.spool.journals import SEGMENT_BYTES, open_journal
from utils.mirror.spool.journal import Journal


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    """A journal of this process with small segments."""
    journal = await open_journal(tmp_path, segment_bytes=SEGMENT_BYTES)
    yield journal
    await journal.close(1.0)
