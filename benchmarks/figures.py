"""Figures of a benchmark: one value a round, judged by the median, and called unclear when the spread is too wide."""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: How sure the interval around a median must be before a bound inside it is worth a verdict.
CONFIDENCE = 0.9


class Verdict(enum.Enum):
    """Whether a figure keeps its bound."""

    KEPT = "yes"
    MISSED = "**no**"
    #: The bound lies within the confidence interval of the median: another run might say the opposite.
    UNCLEAR = "spread too wide to judge"
    UNBOUNDED = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure with the value of each round, and its bound; a figure without a bound is for information."""

    what: str
    values: Sequence[float]
    relation: Literal["≥", "≤", ""] = ""
    bound: float | None = None
    unit: str = ""

    @property
    def median(self) -> float:
        """The value that is judged."""
        return statistics.median(self.values)

    @property
    def verdict(self) -> Verdict:
        """Compare the median with the bound."""
        if self.bound is None:
            return Verdict.UNBOUNDED
        low, high = interval_of_median(self.values)
        if low < self.bound < high:
            return Verdict.UNCLEAR
        kept = self.median >= self.bound if self.relation == "≥" else self.median <= self.bound
        return Verdict.KEPT if kept else Verdict.MISSED

    def __str__(self) -> str:
        shown = [_number(value) for value in (min(self.values), self.median, max(self.values))]
        if len(self.values) == 1:
            shown[0] = shown[2] = ""
        bound = "" if self.bound is None else f"{self.relation} {self.bound:g}{self.unit}"
        cells = (self.what, shown[0], shown[1] + self.unit, shown[2], bound, self.verdict.value)
        return "| " + " | ".join(cells) + " |"


def ratio(
    what: str,
    numerator: Sequence[float],
    denominator: Sequence[float],
    relation: Literal["≥", "≤", ""] = "",
    bound: float | None = None,
    unit: str = "",
) -> Figure:
    """Divide round by round: what slows the machine down for a while slows both sides of a round."""
    return Figure(what, [a / b for a, b in zip(numerator, denominator, strict=True)], relation, bound, unit)


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """Return the narrowest interval of order statistics that contains the true median with `CONFIDENCE`.

    The number of values below the true median is binomial with p = 1/2, whatever their distribution. With fewer than
    five values not even all of them reach the confidence: then the interval is from the lowest to the highest.
    """
    ordered, count = sorted(values), len(values)
    cut, outside = 0, 0.0
    while cut < count // 2:
        outside += math.comb(count, cut) / 2**count
        if 1 - 2 * (outside + math.comb(count, cut + 1) / 2**count) < CONFIDENCE:
            break
        cut += 1
    return ordered[cut], ordered[-1 - cut]


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table."""
    head = ["| what | min | median | max | bound | kept |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    return "\n".join([*head, *map(str, figures)])


def _number(value: float) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
