"""`python bot.py new pack NAME` writes a repository that passes its linters, its type checker and its own tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import IS_EXHAUSTIVE
from tests.operations.migrations.support import HEAD
from utils.demo.bot_process import environment
from utils.exceptions import ValidationError
from utils.operations.development.pack_scaffold import new_pack

ROOT = Path(__file__).parents[2]
#: What `make lint` knows of the packages that are imported.
CACHE = ROOT / ".mypy_cache"
#: Has two words, to check the names of classes and of the project.
NAME = "a_pack"


def run(directory: Path, *command: str) -> str:
    """Run a command in a directory, which must succeed, and return its output."""
    done = subprocess.run(
        command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_generated_files_pass_every_check(tmp_path: Path) -> None:
    """Of one pack beside this clone's sources: making it and starting Python costs more than most of the checks."""
    pack = tmp_path / NAME
    arguments = ("new", "pack", NAME, "--directory", str(pack), "--json")
    written = json.loads(run(ROOT, sys.executable, "bot.py", *arguments))
    assert {*written["files"]} == {str(path) for path in pack.rglob("*") if path.is_file()}
    for check in ("ruff check", "ruff format --check"):
        run(pack, sys.executable, "-m", *check.split())
    if CACHE.is_dir():
        shutil.copytree(CACHE, pack / CACHE.name)
    if CACHE.is_dir() or IS_EXHAUSTIVE:  # without what `make lint` left, the packages alone take a quarter of a minute
        run(pack, sys.executable, "-m", "mypy", ".")
    assert "2 passed" in run(pack, sys.executable, "-m", "pytest")


def test_nothing_of_the_template_is_left(tmp_path: Path) -> None:
    pack = tmp_path / NAME
    new_pack(NAME, pack)
    for path in pack.rglob("*"):
        if path.is_file():
            assert "@name@" not in path.read_text(encoding="utf-8").lower(), path
            assert path.suffix != ".template"
    assert tomllib.loads((pack / NAME / "pack.toml").read_text()) == {"name": NAME, "requires": HEAD}
    project = tomllib.loads((pack / "pyproject.toml").read_text())["project"]
    assert project["name"] == "a-pack"


@pytest.mark.parametrize("name", ["", "9lives", "Tally", "class", "x" * 21, "tally-bot", "json", "utils", "db"])
def test_refuses_names_that_are_invalid_or_taken(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValidationError, match=r"not a valid name|the name of something else"):
        new_pack(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_writes_into_an_empty_directory_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValidationError, match="exists and is not empty"):
        new_pack("economy", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
