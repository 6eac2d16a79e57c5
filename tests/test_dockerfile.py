"""The Dockerfile, read without a container engine: what it installs, and how it starts and stops."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from utils.operations.backup.archive import client_tools
from utils.operations.doctor.server import NEWEST_TESTED

ROOT = Path(__file__).parents[1]
#: The oldest server whose tools the image has.
OLDEST = 15


def instructions() -> list[tuple[str, str]]:
    """Return the instructions, with continued lines joined and without comments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def arguments_of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_has_the_tools_of_every_supported_server() -> None:
    installed = {int(major) for run in arguments_of("RUN") for major in re.findall(r"postgresql-client-(\d+)", run)}
    assert installed == set(range(OLDEST, NEWEST_TESTED + 1))
    assert client_tools.DIRECTORIES[0] == "/usr/lib/postgresql/{major}/bin", "where the packages put them"


def test_uses_the_repository_of_its_own_release() -> None:
    (base,) = arguments_of("FROM")
    release = base.rpartition("-")[2]
    (run,) = [run for run in arguments_of("RUN") if "apt.postgresql.org.sh" in run]
    assert f"apt.postgresql.org.sh -y {release}" in run
    steps = [step.strip() for step in run.split("&&")]
    assert steps[0] == "apt-get update"
    assert steps[-1] == "rm -rf /var/lib/apt/lists/*"
    repository = next(number for number, step in enumerate(steps) if "apt.postgresql.org.sh" in step)
    assert "postgresql-client-common" in steps[repository - 1], "it brings the script and the key"
    assert f"postgresql-client-{NEWEST_TESTED}" in steps[repository + 1]


@pytest.mark.parametrize("run", arguments_of("RUN"))
def test_every_command_can_be_parsed(run: str) -> None:
    done = subprocess.run(["sh", "-n", "-c", run], capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_installs_as_root_and_runs_as_somebody_else() -> None:
    names = [name for name, _ in instructions()]
    assert arguments_of("USER") == ["guildbook"]
    assert names.index("USER") > max(number for number, name in enumerate(names) if name == "RUN")


def test_a_signal_reaches_the_bot_itself() -> None:
    assert [json.loads(command) for command in arguments_of("CMD")] == [["python", "bot.py"]]
    assert arguments_of("STOPSIGNAL") == ["SIGTERM"]
    assert arguments_of("ENTRYPOINT") == []


def test_ignores_what_must_not_be_in_the_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".env", ".data", ".git", ".venv"} <= set(ignored)
