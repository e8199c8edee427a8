"""``python -m benchmarks.compare NEW.jsonl OLD.jsonl``: tells what got slower, as a run does with ``--compare``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import report
from .cases import OURS
from .report import MACHINE, POINT

#: Growth that is always allowed, for noise that no single run shows: see ``compare``.
FLOOR = 1.1


@dataclasses.dataclass
class Change:
    """Holds a case and mode of both files: our medians, how many times as long it takes, and what noise explains."""

    case: str
    mode: str
    point: str  # case, mode and dtype; with "+graph" for our CUDA graph
    old_ms: float
    new_ms: float
    peers: float | None  # how many times as long they take; None on a GPU, where our median itself is compared
    factor: float
    noise: float

    @property
    def regressed(self) -> bool:
        return self.factor > self.noise


@dataclasses.dataclass
class Comparison:
    """Lists what could be compared; and by name what only the old file has, is wrong now, or has no common peer."""

    changes: list[Change]
    gone: list[str]
    wrong: list[str]
    alone: list[str]

    @property
    def worse(self) -> bool:
        return bool(self.gone or self.wrong) or any(change.regressed for change in self.changes)


def compare(new: Sequence[dict], old: Sequence[dict]) -> Comparison:
    """Compare our rows in ``new`` with those in ``old`` of the same machine, case, mode and dtype.

    The clock and the neighbours of a CPU change between runs. So what is compared on a CPU is our median ÷ the
    geometric mean of the medians of all P peers that are verified in both files, not counting variants of ours. On a
    GPU it is our median itself, and that of our CUDA graph.

    A figure regressed if it grew by more than the factor 1.1 · exp(2u). Here u² is the sum over both files of our s²
    and, on a CPU, of the peers' Σ s² ÷ P², with s = ½ ln(p80 ÷ p20), which is some 0.84 standard deviations of single
    calls. The spread is that of calls and not of medians, because all calls of a run share its moment. The tenth is
    for what no single run shows: memory laid out differently, and the spread of what was called once.

    Raises:
        ValueError: the files have nothing in common; the message says what each holds.
    """
    before, now = _points(old), _points(new)
    if not before.keys() & now.keys():
        raise ValueError(f"nothing to compare: new are {_summary(new)}; old are {_summary(old)}")
    machines = {point[-len(MACHINE) :] for point in now}
    found = Comparison([], [], [], [])
    for point, rows in before.items():
        if point[-len(MACHINE) :] not in machines:
            continue
        for ours in (OURS, f"{OURS}+graph"):
            if not _verified(rows, ours):
                continue
            name = " ".join(point[:3]) + ours.removeprefix(OURS)
            if ours not in now.get(point, {}):
                found.gone.append(name)
            elif not _verified(now[point], ours):
                found.wrong.append(name)
            elif change := _change(name, ours, now[point], rows):
                found.changes.append(change)
            else:
                found.alone.append(name)
    return found


def _change(name: str, ours: str, new: dict[str, dict], old: dict[str, dict]) -> Change | None:
    peers = []
    if new[ours]["device"] == "cpu":
        others = [peer for peer in old if not peer.startswith(OURS)]
        peers = [peer for peer in others if _verified(old, peer) and _verified(new, peer)]
        if not peers:
            return None
    growth = {peer: math.log(new[peer]["median_ms"] / old[peer]["median_ms"]) for peer in (ours, *peers)}
    of_peers = statistics.fmean(growth[peer] for peer in peers) if peers else 0.0
    variance = sum(
        _spread(rows[ours]) ** 2 + sum(_spread(rows[peer]) ** 2 for peer in peers) / max(len(peers), 1) ** 2
        for rows in (new, old)
    )
    return Change(
        new[ours]["case"],
        new[ours]["mode"],
        name,
        old[ours]["median_ms"],
        new[ours]["median_ms"],
        math.exp(of_peers) if peers else None,
        factor=math.exp(growth[ours] - of_peers),
        noise=FLOOR * math.exp(2 * math.sqrt(variance)),
    )


def _spread(row: dict) -> float:
    return math.log(row["p80_ms"] / row["p20_ms"]) / 2


def _points(rows: Sequence[dict]) -> dict[tuple, dict[str, dict]]:
    points: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        points[tuple(row[name] for name in POINT)][row["provider"]] = row
    return points


def _verified(rows: dict[str, dict], provider: str) -> bool:
    return provider in rows and rows[provider]["verified"]


def _summary(rows: Sequence[dict]) -> str:
    machines = {f"{row['device_name']} (malloc {row['malloc']})" for row in rows}
    names = sorted({row["case"] for row in rows})
    return f"{len(names)} cases ({', '.join(names[:2])}, …) on {' and '.join(sorted(machines))}" if rows else "no rows"


def show(found: Comparison, console: Console) -> None:
    """Print what got worse, as a table and as names, and a last line that sums up."""
    regressions = sorted((change for change in found.changes if change.regressed), key=lambda change: -change.factor)
    if regressions:
        table = Table(title="slower than before, beyond noise", title_justify="left")
        table.add_column("case, mode, dtype")
        for column in (f"{OURS}, ms", "peers took", "against them", "noise up to"):
            table.add_column(column, justify="right")
        for change in regressions:
            peers = "–" if change.peers is None else f"{change.peers:.2f}×"
            times = f"{change.old_ms:.3f} → {change.new_ms:.3f}"
            table.add_row(change.point, times, peers, f"{change.factor:.2f}×", f"{change.noise:.2f}×")
        console.print(table)
    for names, what in (
        (found.wrong, "was right and is wrong now"),
        (found.gone, "is gone, or did not run"),
        (found.alone, "has no peer in both and was not compared"),
    ):
        for name in names:
            console.print(f"  {name}: {what}", markup=False, highlight=False)
    verdict = f"{len(regressions)} of" if regressions else "nothing regressed in"
    console.print(f"{verdict} {len(found.changes)} cases and modes that were compared", markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Compare results files. Exit code 1: something is slower beyond noise, wrong, or gone.",
    )
    parser.add_argument("new", type=Path, help="results file")
    parser.add_argument("old", type=Path, help="results file to compare it with")
    options = parser.parse_args(arguments)
    try:
        found = compare(report.read(options.new), report.read(options.old))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    show(found, Console(width=None if sys.stdout.isatty() else 140))
    return 1 if found.worse else 0


if __name__ == "__main__":
    sys.exit(main())
