"""Code for cog authors imports only what is meant for them, so that Guildbook's other modules can change."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.docs.blocks import ROOT, TUTORIAL, blocks_of
from utils.operations.development import scaffold

PUBLIC = {
    "utils.base_cog", "utils.db", "utils.exceptions", "utils.packs", "utils.repositories", "models", "models.base",
}  # fmt: skip
PACKS = sorted(path.parent for path in (ROOT / "examples").glob("*/pack.toml"))
INTERNAL_PACKAGES = ("utils", "models", "cogs", "simulator", "tests", "migrations")


def sources() -> Iterator[tuple[str, str]]:
    """Yield the name and the code of everything that cog authors copy or learn from."""
    examples = sorted((ROOT / "examples").glob("*.py"))
    packs = [path for pack in PACKS for path in sorted(pack.rglob("*.py"))]
    for path in [*examples, *packs, ROOT / "cogs" / "preferences.py"]:
        yield str(path.relative_to(ROOT)), path.read_text()
    for page in (ROOT / "README.md", TUTORIAL):
        for number, block in enumerate(block for block in blocks_of(page) if block.language == "python"):
            yield f"{page.name}, block {number + 1}", block.text
    words = {"name": "example", "title": "Example"}
    yield "the scaffold's cog", scaffold._COG.format(**words)
    yield "the scaffold's model", scaffold._MODEL.format(**words)


@pytest.mark.parametrize(("name", "code"), [pytest.param(name, code, id=name) for name, code in sources()])
def test_author_code_imports_only_public_modules(name: str, code: str) -> None:
    body = ast.parse(code if not code.startswith(" ") else f"class _:\n{code}")
    modules = {node.module or "" for node in ast.walk(body) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(body) if isinstance(node, ast.Import) for alias in node.names}
    internal = {module for module in modules if module.split(".")[0] in INTERNAL_PACKAGES}
    assert internal <= PUBLIC, f"{name} imports {', '.join(sorted(internal - PUBLIC))}"


def test_examples_are_listed_and_short() -> None:
    readme = (ROOT / "examples" / "README.md").read_text()
    examples = [path for path in (ROOT / "examples").glob("*.py") if path.name not in ("__init__.py", "conftest.py")]
    assert len(examples) >= 3
    for path in examples:
        assert f"[{path.name}]({path.name})" in readme
        assert len(path.read_text().splitlines()) <= 100
    assert len(PACKS) >= 3
    for pack in PACKS:
        assert f"[{pack.name}/]({pack.name}/)" in readme
        assert sum(len(path.read_text().splitlines()) for path in pack.rglob("*.py")) <= 250


def test_public_modules_export_what_authors_need() -> None:
    from utils import base_cog, db

    needed = {"BaseCog", "Batch", "Guildbook", "MirrorChange", "UserConverter", "bounded", "idempotent"}
    assert needed <= set(base_cog.__all__)
    assert {"Database", "Documents", "Transaction", "preferences"} <= set(db.__all__)
