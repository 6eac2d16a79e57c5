"""Finding packs, their settings and their texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packs.support import require, using, write_pack
from utils import packs
from utils.exceptions import SettingsError
from utils.packs import Locales
from utils.settings import RESERVED_NAMES, load_settings


@pytest.fixture
def economy(tmp_path: Path) -> Path:
    """The repository of a pack."""
    return write_pack(tmp_path, "economy")


def test_finds_a_repository_by_its_path_and_an_installed_package_by_its_name(economy: Path) -> None:
    with using(economy) as (by_path,):
        assert (by_path.name, by_path.package, by_path.directory) == ("economy", "economy", economy / "economy")
        assert by_path.cogs() == ["economy.cogs.economy"]
        with packs.using("economy") as (by_name,):
            assert by_name.directory == by_path.directory
    assert packs.active() == []


def test_names_cogs_for_their_pack(economy: Path) -> None:
    (economy / "economy/cogs/shop.py").touch()
    (economy / "economy/cogs/_private.py").touch()
    with using(economy) as (pack,):
        assert [pack.short_name(module) for module in pack.cogs()] == ["economy", "economy.shop"]


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        (None, "contains no pack; expected one package with a pack.toml, as python bot.py new pack writes"),
        ('name = "economy"\n', "requires is None; expected"),
        ('name = "Economy!"\nrequires = "0001"\n', "the name 'Economy!' is not 1 to 20 lower-case letters"),
        ('name = "economy"\nrequires = "0001"\nversion = "1"\n', "unknown: version"),
        ('name = "guildbook"\nrequires = "0001"\n', "the name 'guildbook' is Guildbook's"),
        (f'name = "{RESERVED_NAMES[0]}"\nrequires = "0001"\n', "is Guildbook's; rename the pack"),
        ("name =", "cannot be read"),
    ],
)
def test_says_in_one_line_what_is_wrong_with_a_pack(
    economy: Path, metadata: str | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = economy / "economy/pack.toml"
    file.unlink()
    if metadata is not None:
        file.write_text(metadata)
    monkeypatch.setenv("COGS", str(economy))
    with pytest.raises(SettingsError) as raised:
        load_settings(None)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.variables == ("COGS",)


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ("./nowhere", "COGS: ./nowhere is no directory"),
        ("no_such_package_anywhere", "no package 'no_such_package_anywhere' is installed"),
        ("json", "json is no pack"),
    ],
)
def test_refuses_entries_that_name_nothing(entries: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGS", entries)
    with pytest.raises(SettingsError, match=line):
        load_settings(None)


def test_refuses_two_packs_of_one_name_and_changes_nothing(tmp_path: Path, economy: Path) -> None:
    other = write_pack(tmp_path / "other", "shop")
    require(other, "0001")
    (other / "shop/pack.toml").write_text('name = "economy"\nrequires = "0001"\n')
    with using(economy):
        with pytest.raises(SettingsError, match="are both named 'economy'"):
            packs.activate([str(economy), str(other)])
        with pytest.raises(SettingsError, match="are the same pack 'economy'; remove one"):
            packs.activate([str(economy), f"{economy}/economy"])
        assert [pack.name for pack in packs.active()] == ["economy"]


def test_refuses_a_package_that_another_hides(tmp_path: Path) -> None:
    root = write_pack(tmp_path, "economy")
    (root / "economy").rename(root / "json")
    with pytest.raises(SettingsError, match=r"Python imports .*json.* by that name; rename the pack"), using(root):
        pass


def test_settings_have_the_pack_before_their_names(economy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env_file = economy / ".env"
    with using(economy) as (pack,):
        assert packs.load_pack_settings(pack, None).model_dump() == {"step": 1}
        env_file.write_text("ECONOMY_STEP=5\n")
        assert packs.load_pack_settings(pack, env_file).model_dump() == {"step": 5}
        monkeypatch.setenv("ECONOMY_STEP", "0")
        with pytest.raises(SettingsError) as raised:
            packs.load_pack_settings(pack, env_file)
        assert str(raised.value) == "ECONOMY_STEP: input should be greater than or equal to 1"
        assert raised.value.variables == ("ECONOMY_STEP",)


def test_texts_fall_back_to_the_language_and_then_to_english(economy: Path) -> None:
    with using(economy) as (pack,):
        texts = Locales.of(pack)
        assert texts.text("count", "de", count=3) == "Dein Stand ist 3."
        assert texts.text("count", "fr", count=3) == texts.text("count", "en-GB", count=3) == "Your count is 3."
        with pytest.raises(KeyError, match="no text 'nothing'"):
            texts.text("nothing", "de")
        (economy / "economy/locales/de.json").write_text('["count"]')
        with pytest.raises(SettingsError, match="expected a JSON object whose values are texts"):
            Locales.of(pack)
