"""Rules on the source tree: imports run one way, only command lines print, SQL is never built from values."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "utils", "cogs", "simulator", "testing", "tests", "benchmarks", "migrations")
#: Every package and module of the product, lowest layer first: each may import itself and what stands before it here.
#: (docs/explanation/architecture.md draws it.)
LAYERS = (
    "models",
    "utils.exceptions",
    "utils.text",
    "utils.files",
    "utils.cache",
    "utils.tasks",
    "utils.logs",
    "utils.packs",
    "utils.database",
    "utils.retrying",
    "utils.settings",
    "utils.service",
    "utils.mirror.records",
    "utils.mirror.translate",
    "utils.mirror.discord",
    "utils.mirror.spool",
    "utils.mirror.write",
    "utils.mirror.reconcile",
    "utils.mirror.batches",
    "utils.mirror.change_feed",
    "utils.mirror.mirror",
    "utils.mirror",
    "utils.repositories",
    "utils.documents",
    "utils.operations.action",
    "utils.operations.confirm",
    "utils.operations.slash",
    "utils.operations.migrations",
    "utils.operations.upkeep",
    "utils.operations.backup",
    "utils.operations.importing",
    "utils.operations.doctor",
    "utils.operations.development",
    "utils.operations",
    "utils.bot",
    "utils.base_cog",
    "utils.db",
    "utils",
    "cogs",
    "utils.cli",
    "utils.demo",
    "bot",
)
#: Maximum number of modules directly in `utils/`.
LOOSE_MODULES = 10
#: Command lines, which print their results.
COMMAND_LINES = {
    "simulator.__main__",
    "simulator.throughput",
    "utils.operations.migrations.__main__",
    "benchmarks.__main__",
    "bot",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
FILES["bot"] = ROOT / "bot.py"
PRODUCT = sorted(name for name in FILES if name.split(".")[0] not in ("testing", "tests", "benchmarks", "migrations"))


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(), str(FILES[name]))


def imported(name: str, *, at_once: bool = False, at_run_time: bool = False) -> Iterator[str]:
    """Yield the modules that a module imports.

    `at_once`: only those imported at module level; `at_run_time`: all except those under `TYPE_CHECKING`.
    """
    nodes = list(_at_once(tree(name).body)) if at_once else list(ast.walk(tree(name)))
    if at_run_time:
        skipped = {id(child) for node in nodes if _is_type_checking(node) for child in ast.walk(node)}
        nodes = [node for node in nodes if id(node) not in skipped]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            module = (
                ".".join(filter(None, (*_package(name)[: 1 - node.level or None], node.module)))
                if node.level
                else str(node.module)
            )
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield whole if whole in FILES else module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _package(name: str) -> tuple[str, ...]:
    parts = tuple(name.split("."))
    return parts if FILES[name].name == "__init__.py" else parts[:-1]


def _at_once(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and _is_type_checking(node):
            yield from _at_once(node.orelse)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _at_once(
                [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
            )
        else:
            yield node


def is_ours(name: str) -> bool:
    return name.split(".")[0] in (*PACKAGES, "bot")


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(name: str) -> str:
    """Return the longest entry of `LAYERS` that contains a module."""
    return max((layer for layer in LAYERS if within(name, layer)), key=len)


def test_imports_point_to_lower_layers() -> None:
    wrong = [
        f"{name} imports {other}, which is in a higher layer"
        for name in PRODUCT
        if not within(name, "simulator")
        for other in imported(name, at_run_time=True)
        if is_ours(other) and not within(other, "simulator") and other in FILES
        if LAYERS.index(layer_of(other)) > LAYERS.index(layer_of(name))
    ]
    assert wrong == []


def test_every_package_is_in_the_layers() -> None:
    folders = {".".join(path.relative_to(ROOT).parts) for path in (ROOT / "utils").rglob("*") if path.is_dir()}
    packages = {folder for folder in folders if "__pycache__" not in folder and folder.count(".") == 1}
    assert packages <= set(LAYERS)
    assert all(any(within(name, layer) for name in FILES) for layer in LAYERS)


def test_no_folder_holds_a_single_file() -> None:
    for folder in {path.parent for name, path in FILES.items() if within(name, "utils")}:
        assert len([path for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__")]) > 1, folder


def test_utils_has_few_loose_modules() -> None:
    assert len([path for path in (ROOT / "utils").glob("*.py") if path.name != "__init__.py"]) <= LOOSE_MODULES


def test_only_the_demo_imports_the_simulator() -> None:
    assert {name for name in PRODUCT for other in imported(name) if within(other, "simulator")} <= {
        name for name in PRODUCT if within(name, "simulator") or within(name, "utils.demo")
    }
    assert not [(name, other) for name in PRODUCT if within(name, "simulator") for other in imported(name)
                if is_ours(other) and not within(other, "simulator")]  # fmt: skip


def test_discord_py_stays_at_the_edge_of_the_mirror() -> None:
    knows = {name for name in PRODUCT if within(name, "utils.mirror") or within(name, "utils.database")
             for other in imported(name) if other.split(".")[0] == "discord"}  # fmt: skip
    assert knows <= {
        "utils.mirror.discord.intents",
        "utils.mirror.discord.member_cache",
        "utils.mirror.discord.people",
        "utils.mirror.discord.permissions",
        "utils.mirror.discord.tap",
        "utils.mirror.discord.source",
        "utils.mirror.reconcile.archived_threads",
    }


def test_imports_have_no_cycles() -> None:
    graph = {
        name: {other for other in imported(name, at_once=True) if other in FILES and other != name} for name in PRODUCT
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                # A package imports its modules, and a module's import runs its package's __init__: not a cycle.
                if not within(other, name) and not within(name, other):
                    visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_command_lines_print() -> None:
    prints = [
        f"{name}:{node.lineno}"
        for name in PRODUCT
        if name not in COMMAND_LINES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []


SQL = re.compile(
    r"\b(SELECT .* FROM|INSERT INTO|UPDATE .* SET|DELETE FROM|TRUNCATE|CREATE |DROP |ALTER |NOTIFY )", re.DOTALL
)
#: Modules that may build SQL with f-strings, and what they insert: only names of our own, never a value.
NAMES_ONLY = {
    "utils.mirror.write.merge_sql": "derived from models/",
    "utils.mirror.reconcile.staging_sql": "derived from models/",
    "utils.mirror.write.batch_rows": "quoted names from models/, of tables and columns of cogs",
    "utils.database.orm": "names of tables that SQLAlchemy knows, never run",
    "utils.database.partitions": "names and bounds of partitions",
    "utils.database.embedded": "the name of its one database, quoted",
    "utils.operations.migrations.schema_catalog": "a WITH of its own in front of each question",
    "utils.demo.compare": "derived from models/",
    "cogs.mirror": "names of mirrored tables",
    "utils.operations.backup.restore.swap": "quoted names from the catalogue",
    "utils.operations.backup.restore.replacing": "quoted names from the catalogue",
    "utils.operations.backup.restore.pairs": "quoted names from the catalogue",
    "utils.operations.backup.restore.foreign_keys": "quoted names from the catalogue",
    "utils.operations.backup.restore.missing_tables": "quoted names and definitions from the catalogue",
    "utils.operations.backup.restore.drill": "quoted names from models/ and the catalogue",
    "utils.operations.backup.scratch.tables": "quoted names from the catalogue",
    "utils.operations.backup.scratch.schemas": "quoted names from the catalogue",
    "utils.operations.backup.scratch.databases": "quoted names from the catalogue",
    "utils.operations.backup.scratch.load": "quoted names from a manifest, known to the catalogue",
}


def test_sql_is_never_built_from_values() -> None:
    built = [
        f"{name}:{line} {text[:60]!r}"
        for name in PRODUCT
        if name not in NAMES_ONLY and not within(name, "simulator")
        for line, text in interpolated_strings(name)
        if SQL.search(text)
    ]
    assert built == []


def interpolated_strings(name: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the constant part of every f-string and every string literal that `.format` is called on."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.JoinedStr) and any(isinstance(part, ast.FormattedValue) for part in node.values):
            yield node.lineno, "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            literal = node.func.value
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                yield node.lineno, literal.value


def test_exceptions_name_existing_files() -> None:
    assert len(PRODUCT) > 40
    assert set(NAMES_ONLY) <= set(FILES)
