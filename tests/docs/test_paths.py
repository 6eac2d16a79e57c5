"""The paths that docs/ draws, one function a line, exist and are as short as promised."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.docs.blocks import Block, blocks

PATHS = [block for block in blocks("text") if block.text.startswith("utils.")]
#: The most files that a path passes, by its first function.
MAX_FILES = {"utils.database.access.Database.fetch": 5}


def resolve(name: str) -> tuple[str, Any]:
    """Return the module of a dotted name, and the object."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return module, found
    raise AssertionError(f"{name}: there is no such module")


@pytest.mark.parametrize("block", PATHS, ids=str)
def test_every_step_exists_and_the_path_is_short(block: Block) -> None:
    steps = block.text.split()
    modules = {module for module, found in map(resolve, steps) if callable(found)}
    assert len(modules) <= MAX_FILES.get(steps[0], 10), steps


def test_the_path_of_a_fetch_is_drawn() -> None:
    assert "utils.database.access.Database.fetch" in {block.text.split()[0] for block in PATHS}
