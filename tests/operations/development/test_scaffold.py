"""`python bot.py new cog NAME` writes code that passes the linters, the type checker and its own test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models import Base
from tests.conftest import IS_EXHAUSTIVE
from tests.docs.test_first_cog import cloned_sources
from utils.bot.registrations import remove_tables
from utils.demo.bot_process import environment
from utils.exceptions import MigrationError, ValidationError
from utils.operations.development.scaffold import new_cog
from utils.operations.migrations.comparison import import_models

#: Sorts before all other modules and has two words, to check the import order and the class names.
NAME = "a_counter"
ROOT = Path(__file__).parents[3]
#: What `make lint` knows of the packages that are imported.
CACHE = ROOT / ".mypy_cache"
FILES = [f"cogs/{NAME}.py", f"models/{NAME}.py", f"tests/test_{NAME}.py"]


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command in a directory."""
    return subprocess.run(
        [sys.executable, *command], cwd=directory, env=environment(), capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_generated_files_pass_every_check_and_are_not_overwritten(tmp_path: Path) -> None:
    clone = cloned_sources(tmp_path / "clone")
    done = run(clone, "bot.py", "new", "cog", NAME)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:3] == [f"wrote {path}" for path in FILES]
    checks = [("ruff", "check", *FILES), ("ruff", "format", "--check", *FILES), ("pytest", FILES[2])]
    if CACHE.is_dir():
        shutil.copytree(CACHE, clone / CACHE.name)
    if CACHE.is_dir() or IS_EXHAUSTIVE:  # without what `make lint` left, the packages alone take a quarter of a minute
        checks.append(("mypy", "--strict", *FILES))
    for check in checks:
        done = run(clone, "-m", *check)
        assert done.returncode == 0, f"{' '.join(check)}\n{done.stdout}{done.stderr}"
    before = (clone / FILES[0]).read_text()
    done = run(clone, "bot.py", "new", "cog", NAME)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"'{NAME}' is taken, choose another name: cogs/{NAME}.py, models/{NAME}.py, tests/test_{NAME}.py exists\n"
    )
    assert (clone / FILES[0]).read_text() == before


@pytest.mark.parametrize(
    "name", ["class", "2fast", "", "Tally", "my-cog", "_shared", "a" * 33, "../x", "naïve", "x\n", "x y"]
)
def test_rejects_names_that_python_or_discord_reject(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValidationError, match="is not a valid name for a cog") as caught:
        new_cog(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["cogs/tally/__init__.py", "models/tally.py", "tests/test_tally.py"])
def test_writes_nothing_if_one_file_exists(tmp_path: Path, taken: str) -> None:
    for directory in ("cogs", "models", "tests"):
        (tmp_path / directory).mkdir()
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).touch()
    with pytest.raises(ValidationError, match="'tally' is taken, "):
        new_cog("tally", tmp_path)
    assert list(tmp_path.rglob("*.py")) == [tmp_path / taken]


TABLE = """
from sqlalchemy.orm import Mapped
from models.base import Base, snowflake

class Found(Base):
    __tablename__ = "found_in_a_cog"
    guild_id: Mapped[int] = snowflake(primary_key=True)
"""


def test_migrations_include_tables_of_cogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "cogs_with_tables"
    (package / "large").mkdir(parents=True)
    for path in ("__init__.py", "large/__init__.py"):
        (package / path).touch()
    (package / "large" / "tables.py").write_text(TABLE)
    (package / "broken_without_tables.py").write_text("raise RuntimeError")
    try:
        import_models(package)
        assert "found_in_a_cog" in Base.metadata.tables
    finally:
        remove_tables(package.name)
    (package / "broken.py").write_text(TABLE + "raise RuntimeError('no')")
    message = "cogs_with_tables.broken declares tables but cannot be imported: RuntimeError: no"
    try:
        with pytest.raises(MigrationError, match=message):
            import_models(package)
    finally:
        remove_tables(package.name)


@pytest.mark.slow
def test_broken_model_fails_the_migration_in_one_line(tmp_path: Path) -> None:
    clone = cloned_sources(tmp_path / "clone")
    broken = clone / "models" / "broken.py"
    broken.write_text("raise RuntimeError('no')")
    done = run(clone, "-m", "alembic", "revision", "--autogenerate", "-m", "x")
    assert done.returncode != 0
    output = (done.stdout + done.stderr).strip().splitlines()
    assert "models.broken declares tables but cannot be imported: RuntimeError: no" in output[-1]
    assert "Traceback" not in done.stdout + done.stderr


def test_failed_write_leaves_no_files(tmp_path: Path) -> None:
    for directory in ("cogs", "models"):
        (tmp_path / directory).mkdir()
    with pytest.raises(ValidationError, match=r"cannot write .*: No such file or directory"):
        new_cog("tally", tmp_path)
    assert list(tmp_path.rglob("*.py")) == []
