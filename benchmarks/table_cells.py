"""Turns a case's rows into cells of a table: times, ratios, memory."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import OURS

NONE = "–"
ALSO_OURS = ("fastcss", "fastcss-packed", "fastcss-unfused", "attention only")


class Point:
    """Holds the verified rows of a case in a mode, by provider."""

    def __init__(self, rows: Sequence[dict], case: str, mode: str = "fwd"):
        named = [row for row in rows if (row["case"], row["mode"]) == (case, mode)]
        self.rows = {row["provider"]: row for row in named if row["verified"]}
        if OURS not in self.rows:
            raise ValueError(f"there is no verified row of {OURS} for {case} in mode {mode}")

    def ms(self) -> str:
        return two_digits(self.rows[OURS]["median_ms"])

    def limit(self) -> str:
        return f"{100 * self.rows[OURS]['limit_ms'] / self.rows[OURS]['median_ms']:.0f}%"

    def times(self, *providers: str) -> float | None:
        """Divide the time of the fastest of these by fastcss's; None if no row has any of them."""
        took = [self.rows[name]["median_ms"] for name in providers if name in self.rows]
        return min(took) / self.rows[OURS]["median_ms"] if took else None

    def fastest_besides(self, *providers: str) -> str | None:
        """Name the fastest provider besides these that is not the package's own."""
        others = [name for name in self.rows if name not in (*ALSO_OURS, *providers)]
        return min(others, key=lambda name: self.rows[name]["median_ms"], default=None)

    def peak(self, *providers: str) -> str:
        """Return the largest peak of these providers."""
        found = [self.rows[name]["peak_mib"] for name in providers if name in self.rows]
        known = [peak for peak in found if peak is not None]
        return mib(max(known)) if known else NONE


def two_digits(number: float) -> str:
    """Write a number with at least two digits: 179, 23, 8.7, 0.49."""
    return f"{number:.0f}" if number >= 9.95 else f"{number:.1f}" if number >= 0.995 else f"{number:.2f}"


def ratio(number: float | None) -> str:
    return NONE if number is None else f"{number:.0f}" if number >= 9.95 else f"{number:.1f}"


def finer(number: float | None) -> str:
    return NONE if number is None else f"{number:.2f}"


def mib(number: float) -> str:
    return f"{number:.0f}" if number >= 0.95 else f"{number:.1f}" if number >= 0.05 else "< 0.1"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write a table without the columns that have no figure: of peers that were not there when the rows were made."""
    kept = [at for at in range(len(head)) if any(line[at] != NONE for line in lines)]
    head, lines = [head[at] for at in kept], [[line[at] for at in kept] for line in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))
