"""The reference is generated, complete and up to date."""

from __future__ import annotations

import importlib
import inspect

import pytest

from docs import generate
from utils.settings import Settings


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return generate.pages()


@pytest.mark.parametrize(
    "name",
    ["settings", "tables", "commands", "permissions", "events", "metrics", "documented-forms", *generate.MODULES],
)
def test_page_is_up_to_date(texts: dict[str, str], name: str) -> None:
    written = (generate.DIRECTORY / f"{name}.md").read_text(encoding="utf-8")
    assert written == texts[name], "the code has changed: run `make docs`"


def test_no_page_is_left_over(texts: dict[str, str]) -> None:
    assert {path.stem for path in generate.DIRECTORY.glob("*.md")} == set(texts)


@pytest.mark.parametrize("page", sorted(generate.MODULES))
def test_every_public_name_has_an_entry(texts: dict[str, str], page: str) -> None:
    for name in generate.MODULES[page][1]:
        module = importlib.import_module(name)
        for public in generate.public_names(module):
            assert f"\n## {public}\n" in texts[page]
            value = getattr(module, public)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), f"{name}.{public} has no docstring"


def test_every_setting_has_a_description() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
