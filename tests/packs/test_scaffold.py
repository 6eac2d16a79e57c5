"""`python bot.py new pack NAME` writes a repository that passes its linters, its type checker and its own tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import sampled
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
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new pack beside this clone's sources."""
    directory = tmp_path_factory.mktemp("scaffold") / NAME
    arguments = ("new", "pack", NAME, "--directory", str(directory), "--json")
    written = json.loads(run(ROOT, sys.executable, "bot.py", *arguments))
    assert {*written["files"]} == {str(path) for path in directory.rglob("*") if path.is_file()}
    if CACHE.is_dir():
        shutil.copytree(CACHE, directory / CACHE.name)
    return directory


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "check",
    sampled(
        ["ruff check", "ruff format --check", "mypy .", "pytest"],
        # mypy where `make lint` ran before: without what it left, the packages alone take a quarter of a minute.
        ["ruff check", "ruff format --check", "pytest", *(["mypy ."] if CACHE.is_dir() else [])],
    ),
)
def test_generated_files_pass(pack: Path, check: str) -> None:
    output = run(pack, sys.executable, "-m", *check.split())
    if check == "pytest":
        assert "2 passed" in output


def test_nothing_of_the_template_is_left(pack: Path) -> None:
    for path in pack.rglob("*"):
        if path.is_file() and not any("cache" in part for part in path.parts):
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
