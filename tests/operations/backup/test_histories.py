"""No history of failures loses the newest good backup of a database, or restores that of another one."""

from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.operations.backup.histories import run_history

#: `make soak ARGS=--backups` runs 1,000.
EXAMPLES = int(os.environ.get("GUILDBOOK_PROPERTY_EXAMPLES", "10"))


@pytest.mark.slow
@given(st.integers(0, 2**32))
@settings(max_examples=EXAMPLES)
def test_no_history_loses_the_newest_good_backup(seed: int) -> None:
    asyncio.run(run_history(seed))
