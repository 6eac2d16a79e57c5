"""The files in `migrations/versions/` as a graph: which revision follows which, and what a database at some lacks.

There are several heads when two developers, or a fork and its upstream, each wrote a revision with the same parent.
"""

from __future__ import annotations

import hashlib
import io
import re
import secrets
import traceback
from collections.abc import Collection, Iterable, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError

from utils import packs
from utils.database.ownership import SCRIPTS, owned_by
from utils.exceptions import MigrationError, UnknownRevision
from utils.packs import Pack

UPGRADE = "python bot.py db upgrade"
#: Ids with a number: ours, and those that `next_id` returns. A pack's have its name before them.
_NUMBERED = re.compile(r"(\d{4})(_[0-9a-f]{4})?")
#: Characters of an id that Alembic's version table takes.
_ID_LENGTH = 32


class Revision(NamedTuple):
    """A revision that this version knows."""

    id: str
    #: The first line of its docstring.
    description: str


def alembic_config(scripts: Path = SCRIPTS) -> Config:
    """Return Alembic's configuration for a directory with `versions/`. A pack's has no `env.py`: ours is used."""
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    if packs.pack_of_scripts(scripts) is not None:
        config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
        config.set_main_option("version_locations", str(scripts / "versions").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


class Revisions:
    """Every revision that this version knows. Raises `MigrationError` for files that do not fit together."""

    def __init__(self, scripts: Path = SCRIPTS) -> None:
        #: Whose revisions these are; None: Guildbook's own.
        self.pack: Pack | None = packs.pack_of_scripts(scripts)
        try:
            self._directory = ScriptDirectory.from_config(alembic_config(scripts))
            found = {step.revision: step for step in self._directory.walk_revisions() if step is not None}
            heads = set(self._directory.get_heads())
        except (CommandError, RevisionError, KeyError) as exc:
            raise MigrationError(f"the revisions in {scripts / 'versions'} do not fit together: {exc}") from exc
        except Exception as exc:  # a file is imported, and may raise anything
            owned_by(scripts)  # names one that does not parse
            raise MigrationError(
                f"a revision cannot be imported: {type(exc).__name__}: {exc}{raised_in(exc, scripts)}; correct or"
                " remove that file"
            ) from exc
        self._parents = {
            revision: {*_as_tuple(step.down_revision), *_as_tuple(step.dependencies)}
            for revision, step in found.items()
        }
        #: Oldest first: a revision comes after those that it revises.
        self.ids = list(TopologicalSorter({id: sorted(self._parents[id]) for id in sorted(found)}).static_order())
        self.known = [Revision(id, (found[id].doc or "").strip().partition("\n")[0]) for id in self.ids]
        #: The newest revision of each branch; one unless branches are to be merged.
        self.heads = tuple(sorted(heads))
        if self.pack is not None:
            self._check_ids(self.pack, [id for id in self.ids if found[id].dependencies])

    def _check_ids(self, pack: Pack, dependent: Sequence[str]) -> None:
        """Raise `MigrationError` for ids that another pack could have, and for revisions that depend on others'."""
        wrong = [id for id in self.ids if not id.startswith(f"{pack.name}_") or len(id) > _ID_LENGTH]
        if wrong:
            raise MigrationError(
                f"pack {pack.name}: revision {wrong[0]}: the id must begin with {pack.name}_ and have at most"
                f" {_ID_LENGTH} characters; python bot.py pack migration {pack.name} writes such revisions"
            )
        if dependent:
            raise MigrationError(
                f"pack {pack.name}: revision {dependent[0]} has depends_on, which ties it to another version table:"
                " remove it, and name the revision of Guildbook that the pack needs in pack.toml"
            )

    def next_id(self) -> str:
        """Return the id for a new revision: the number that follows the highest one, and four random digits.

        A fork's `0007_3f2a` comes after our `0006` and is never the `0007` of a later version.
        """
        return f"{self._next_number()}_{secrets.token_hex(2)}"

    def merge_id(self) -> str:
        """Return the id for the revision that merges all heads.

        Its digits are the same for everybody who merges these heads, so that two who do write one revision and not two.
        """
        return f"{self._next_number()}_{hashlib.sha256(' '.join(self.heads).encode()).hexdigest()[:4]}"

    def _next_number(self) -> str:
        prefix = "" if self.pack is None else f"{self.pack.name}_"
        plain = [id.removeprefix(prefix) for id in self.ids]
        numbers = [int(match[1]) for id in plain if (match := _NUMBERED.fullmatch(id)) is not None]
        return f"{prefix}{max(numbers, default=0) + 1:04}"

    def require_known(self, revisions: Iterable[str]) -> None:
        """Raise `MigrationError` if a database is at a revision that this version does not know."""
        unknown = [revision for revision in revisions if revision not in self._parents]
        if unknown:
            raise unknown_revision(", ".join(unknown), self.pack)

    def files(self, revisions: Iterable[str]) -> list[Path]:
        """Return the files of known revisions."""
        scripts = (self._directory.get_revision(revision) for revision in revisions)
        return [Path(script.path) for script in scripts if script is not None]

    def parents(self, revision: str) -> tuple[str, ...]:
        """Return what a known revision builds on directly."""
        return tuple(sorted(self._parents[revision]))

    def including_ancestors(self, revisions: Iterable[str]) -> set[str]:
        """Return known revisions and everything that they build on."""
        found: set[str] = set()
        remaining = [revision for revision in revisions if revision in self._parents]
        while remaining:
            revision = remaining.pop()
            if revision not in found:
                found.add(revision)
                remaining += self._parents[revision]
        return found

    def newest(self, revisions: Iterable[str]) -> tuple[str, ...]:
        """Return the revisions without those that others of them build on, oldest first."""
        given = set(revisions)
        implied = self.including_ancestors(parent for revision in given for parent in self._parents.get(revision, ()))
        return tuple(revision for revision in self.ids if revision in given - implied)

    def pending(self, current: Iterable[str]) -> list[str]:
        """Return the revisions that a database lacks, oldest first. Raises `MigrationError` for unknown ones."""
        current = tuple(current)
        self.require_known(current)
        applied = self.including_ancestors(current)
        return [revision for revision in self.ids if revision not in applied]

    def needs_merge(self, current: Iterable[str]) -> bool:
        """Whether there are several heads, and the database is not at all of them."""
        return len(self.heads) > 1 and bool(self.pending(current))

    def merge_advice(self) -> str:
        """Return what to type about several heads."""
        if self.pack is not None:
            return (
                f"pack {self.pack.name} has {len(self.heads)} heads, {' and '.join(self.heads)}: its author merges them"
                f" with {self.merge_line()}; then run {UPGRADE}"
            )
        return (
            f"the revisions have {len(self.heads)} heads, {' and '.join(self.heads)}: merge them with"
            f" {self.merge_line()}, then run {UPGRADE}; to apply them without a merge, run {UPGRADE} heads"
        )

    def merge_line(self) -> str:
        """Return the command that merges all heads."""
        if self.pack is not None:
            return f"python bot.py pack merge {self.pack.name}"
        return f'.venv/bin/alembic merge -m "merge" {" ".join(self.heads)} --rev-id {self.merge_id()}'

    def builds_on(self, goal: str, revision: str) -> bool:
        """Whether a database at `goal` (as `resolve` returns it) has `revision`."""
        goals = () if goal == "base" else self.heads if goal == "heads" else (goal.rpartition("@")[2],)
        return revision in self.including_ancestors(goals)

    def is_at(self, current: Sequence[str], goal: str) -> bool:
        """Whether a database has nothing to do to be at `goal` (as `resolve` returns it)."""
        if goal == "base":
            return not current
        return set(current) == set(self.heads) if goal == "heads" else goal in current

    def to_revert(self, current: Collection[str], goal: str) -> list[str]:
        """Return the applied revisions that a downgrade to `goal` reverts, newest first."""
        branch, _, target = goal.rpartition("@")
        applied = self.including_ancestors(current)
        if branch:
            applied &= self.including_ancestors(self._find(branch, goal))
        if target != "base":
            children = {revision for revision in self.ids if target in self.including_ancestors([revision])}
            applied &= children - {target}
        return [revision for revision in reversed(self.ids) if revision in applied]

    def resolve(self, current: Sequence[str], revision: str | None, *, down: bool = False) -> str:
        """Return what an operator means: a revision's id, `heads`, `base` or, for a downgrade, `branch@id`.

        `current`: where the database is. `revision`: None means the newest or, for a downgrade, the previous one.
        Raises `MigrationError` for an unknown revision, for one in the other direction, and where a merge is needed.
        """
        self.require_known(current)
        if down:
            return self._resolve_downgrade(current, revision)
        if revision in (None, "head"):
            if self.needs_merge(current):
                raise MigrationError(self.merge_advice())
            revision = "heads"
        if revision == "heads":
            return self.heads[0] if len(self.heads) == 1 else "heads"
        assert revision is not None, "replaced above"
        if revision == "base":
            if current:
                raise self._wrong_direction(current, "base", down=False)
            return "base"
        goal = self._find_one(revision)
        if goal not in current and goal in self.including_ancestors(current):
            raise self._wrong_direction(current, goal, down=False)
        return goal

    def _resolve_downgrade(self, current: Sequence[str], revision: str | None) -> str:
        if revision is None:
            if not current:
                return "base"
            parents = _as_tuple(self._directory.get_revision(current[0]).down_revision)
            if len(current) > 1 or len(parents) > 1:
                raise MigrationError(
                    f"the database is at {', '.join(current)}, before which there are several revisions: name the one"
                    f" to downgrade to, for example {_examples(current, parents)}"
                )
            return parents[0] if parents else "base"
        if revision == "base":
            return "base"
        branch, _, target = revision.rpartition("@")
        if revision in ("head", "heads") or target in ("head", "heads"):
            target = branch = ""
        goal = "base" if target == "base" else self._find_one(target or revision)
        if branch:
            self._find(branch, revision)
        if goal != "base" and goal not in self.including_ancestors(current):
            raise self._wrong_direction(current, goal, down=True)
        return f"{branch}@{goal}" if branch else goal

    def _find_one(self, revision: str) -> str:
        if revision in self._parents:
            return revision
        found = self.heads if revision in ("head", "heads") else self._find(revision, revision)
        if len(found) > 1:
            raise UnknownRevision(f"{revision[:40]} stands for {' and '.join(found)}: choose one of them")
        return found[0]

    def _find(self, symbol: str, given: str) -> tuple[str, ...]:
        """Return the revisions that an id, a branch label or `label@head` stands for."""
        if symbol in self._parents:
            return (symbol,)
        labels = {label for step in self._directory.walk_revisions() for label in step.branch_labels}
        found: tuple[str, ...] = ()
        if symbol.rpartition("@")[0] in labels or symbol in labels:
            name = symbol if "@" in symbol else f"{symbol}@head"
            try:
                found = tuple(step.revision for step in self._directory.get_revisions(name) if step is not None)
            except (CommandError, RevisionError):
                found = ()
        if not found:
            raise UnknownRevision(
                f"there is no revision {given[:40]!r}: choose one of {', '.join(['base', *self.ids, *sorted(labels)])}"
            )
        return found

    @staticmethod
    def _wrong_direction(current: Sequence[str], goal: str, *, down: bool) -> UnknownRevision:
        return UnknownRevision(
            f"the database is at {', '.join(current) or 'base'}, and {goal} is {'later' if down else 'earlier'}: that"
            f" is {'an upgrade' if down else 'a downgrade'}"
        )


def unknown_revision(revision: str, pack: Pack | None = None) -> MigrationError:
    """Return the error for a database at a revision that this version, or this version of a pack, does not know."""
    if pack is not None:
        return MigrationError(
            f"pack {pack.name}: the database is at revision {revision}, which this version of the pack does not know:"
            " use the newer version that migrated it, or bring the revision's file back"
        )
    return MigrationError(
        f"the database is at revision {revision}, which this version does not know: a newer Guildbook migrated it,"
        " or the revision's file is missing. Run that version, bring the file back, or restore a backup; if the schema"
        " is at a revision that this version knows, python bot.py db stamp REVISION checks and records it"
    )


def raised_in(exc: BaseException, scripts: Path) -> str:
    """Return the file and the line in a directory of revisions where an error was raised, as " (file, line 1)"."""
    frames = [
        frame for frame in traceback.extract_tb(exc.__traceback__) if Path(frame.filename).is_relative_to(scripts)
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _as_tuple(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _examples(current: Sequence[str], parents: Sequence[str]) -> str:
    if len(current) > 1:
        return f"{current[-1]}@{parents[0]}" if parents else "base"
    return " or ".join(parents)
