"""Two versions of Guildbook measured in turn: `python -m benchmarks merge --against REVISION`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from benchmarks.figures import Figure, ratio

ROOT = Path(__file__).resolve().parent.parent
#: How much worse a figure may be before it counts: what two runs of one version differ by.
TOLERANCE = 0.05
#: Seconds that one run of one version may take.
RUN_SECONDS = 3_600.0
Reading = Mapping[str, tuple[float, str]]


def parse_table(text: str) -> dict[str, tuple[float, str]]:
    """Read a table that a version has printed: the median of each figure, and which way its bound goes."""
    found: dict[str, tuple[float, str]] = {}
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] == "what":
            columns = cells
        elif columns and len(cells) == len(columns) and not cells[0].startswith("---"):
            row = dict(zip(columns, cells, strict=True))
            number = re.match(r"-?[\d,]+(\.\d+)?", row["median" if "median" in row else "figure"])
            if number is not None:
                found[row["what"]] = float(number.group().replace(",", "")), row["bound"][:1]
    return found


def compare(before: Sequence[Reading], after: Sequence[Reading]) -> list[Figure]:
    """Return, for each figure that both versions have and that has a bound, the later one's value over the former's."""
    figures = []
    for what, (value, relation) in after[0].items():
        if relation not in ("≥", "≤") or value == 0 or not all(reading.get(what, (0,))[0] for reading in before):
            continue
        side: Literal["≥", "≤"] = "≥" if relation == "≥" else "≤"
        bound = 1 - TOLERANCE if side == "≥" else 1 + TOLERANCE
        figures.append(ratio(what, [run[what][0] for run in after], [run[what][0] for run in before], side, bound))
    return figures


async def measure_against(revision: str, parts: Sequence[str], runs: int) -> list[Figure]:
    """Run the parts in a checkout of `revision` and in this one, in turn, each `runs` times."""
    before: list[Reading] = []
    after: list[Reading] = []
    async with _checkout(revision) as directory:
        for turn in range(runs):
            sides = [(before, directory), (after, ROOT)]
            for readings, root in sides if turn % 2 == 0 else sides[::-1]:
                readings.append(parse_table(await _output(sys.executable, "-m", "benchmarks", *parts, cwd=root)))
    return compare(before, after)


@contextlib.asynccontextmanager
async def _checkout(revision: str) -> AsyncIterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="guildbook-bench-version-"))
    try:
        await _output("git", "worktree", "add", "--force", "--detach", str(directory), revision, cwd=ROOT)
        yield directory
    finally:
        await _output("git", "worktree", "remove", "--force", str(directory), cwd=ROOT)
        shutil.rmtree(directory, ignore_errors=True)


async def _output(*arguments: str, cwd: Path) -> str:
    process = await asyncio.create_subprocess_exec(*arguments, cwd=cwd, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(RUN_SECONDS):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    # A version whose bounds are not kept ends with 1: its figures count all the same.
    if process.returncode not in (0, 1, 3):
        raise RuntimeError(f"{' '.join(arguments[:4])} in {cwd} ended with {process.returncode}")
    return output.decode()
