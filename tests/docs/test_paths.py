"""The paths that docs/ draws, one function a line, are those of the code, and as short as promised."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import Block, blocks

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(r"_(?!_)\w+")
#: Documented names with an underscore (named tuples, `os`, `sys`), and private names that the product itself defines.
OWN_OR_PUBLIC = {"_replace", "_asdict", "_exit", "_getframe"} | set(
    re.findall(r"(?:self\.|def |class )(_(?!_)\w+)", "".join(p.read_text() for p in (ROOT / "utils").rglob("*.py")))
) - {"_checks", "_connection"}
PATHS = [block for block in blocks("text") if block.text.startswith("utils.")]
#: The most files that a path passes, by its first function.
MAX_FILES = {"utils.database.access.Database.fetch": 5}
#: Steps that no earlier step names, and how they are reached.
REACHED_OTHERWISE = {
    "utils.mirror.translate.live._member_update": "the table ROW_PARSERS",
    "utils.mirror.write.writer.MirrorWriter._keep_writing": "a task that waits for the buffer",
    "utils.mirror.batches.TableWriter._write": "a task that waits for rows",
    "utils.bot.process.Process._main": "a task of Process.run",
    "utils.cli.common.run_action": "a command",
    "utils.operations.doctor.context.DoctorContext.connect": "the checks",
    "utils.operations.migrations.environment.run_online": "migrations/env.py",
}


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


@pytest.mark.parametrize("block", PATHS, ids=str)
def test_every_step_is_called_by_an_earlier_one(block: Block) -> None:
    steps = block.text.split()
    for index, step in enumerate(steps[1:], start=1):
        callers = {name for earlier in steps[:index] for name in names_in(earlier)}
        assert step.rpartition(".")[2] in callers or step in REACHED_OTHERWISE, f"nothing before it calls {step}"


@pytest.mark.parametrize("block", [block for block in PATHS if "\n    " in block.text], ids=str)
def test_each_branch_reaches_the_step_after_it(block: Block) -> None:
    lines = block.text.splitlines()
    for index, line in enumerate(lines):
        if line.startswith(" "):
            after = next(step for step in lines[index:] if not step.startswith(" "))
            assert after.rpartition(".")[2] in names_in(line.strip()), f"{line} does not call {after}"


def names_in(step: str) -> set[str]:
    """Return the names in the source of a function, and in that of the private functions of its module it names."""
    module, _ = resolve(step)
    functions: dict[str, list[ast.AST]] = {}
    for node in ast.walk(ast.parse(Path(str(importlib.import_module(module).__file__)).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions.setdefault(node.name, []).append(node)
    found: set[str] = set()
    waiting = [step.rpartition(".")[2]]
    while waiting:
        for function in functions.get(waiting.pop(), []):
            for node in ast.walk(function):
                name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
                if name and name not in found:
                    found.add(name)
                    if name.startswith("_"):
                        waiting.append(name)
    return found


@pytest.mark.parametrize("start", ["utils.database.access.Database.fetch", "utils.settings.load_settings"])
def test_the_paths_of_a_fetch_and_of_database_url_are_drawn(start: str) -> None:
    assert start in {block.text.split()[0] for block in PATHS}


def test_the_path_of_a_member_update_is_drawn() -> None:
    (steps,) = [block.text.split() for block in PATHS if "utils.mirror.translate.live._member_update" in block.text]
    assert steps[0] == "utils.mirror.discord.tap._received_message"
    assert steps[-1] == "utils.mirror.write.merge_sql.merge_arrays"


def private_uses() -> set[tuple[str, str]]:
    """Return (module, name) for each private attribute or import of another package's in the product."""
    uses: set[tuple[str, str]] = set()
    for path in [*(ROOT / "utils").rglob("*.py"), *(ROOT / "cogs").rglob("*.py"), ROOT / "bot.py"]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("utils", "models", "__")):
                uses |= {(module, alias.name) for alias in node.names if PRIVATE.fullmatch(alias.name)}
            elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                uses |= set() if is_own else {(module, node.attr)}
    return {(module, name) for module, name in uses if name not in OWN_OR_PUBLIC}


def test_every_private_hook_is_documented() -> None:
    section = (ROOT / "docs" / "explanation" / "architecture.md").read_text().split("## Private hooks", 1)[1]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `utils")]
    documented = {(row[1].strip(" `"), name) for row in rows for name in re.findall(r"_\w+", row[2])}
    used = private_uses()
    assert used - documented == set(), "add these to the table in docs/explanation/architecture.md"
    assert all((ROOT / row[4].strip(" `")).exists() for row in rows)
