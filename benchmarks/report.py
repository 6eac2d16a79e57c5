"""One figure of a benchmark, its bound if it has one, and the table of them all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A figure and the bound that it has to keep; without a bound it is there to be compared with."""

    what: str
    figure: float
    relation: str = ""
    bound: float | None = None
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Whether the figure keeps its bound."""
        if self.bound is None:
            return True
        return self.figure >= self.bound if self.relation == "≥" else self.figure <= self.bound

    def __str__(self) -> str:
        figure = f"{self.figure:,.2f}" if isinstance(self.figure, float) else f"{self.figure:,}"
        if self.bound is None:
            return f"| {self.what} | {figure}{self.unit} | | |"
        verdict = "yes" if self.holds else "**no**"
        return f"| {self.what} | {figure}{self.unit} | {self.relation} {self.bound:g}{self.unit} | {verdict} |"


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    return "\n".join(["| what | figure | bound | kept |", "| --- | ---: | ---: | --- |", *map(str, rows)])
