"""``python -m benchmarks.plot [FILE.jsonl …] [--out FOLDER]``: the pictures that the README shows."""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from . import report
from .registry import OURS

RESULTS = Path(__file__).parent / "results"
OUR_COLOR, PEER_COLOR = "#1b6ca8", "#b9c4cc"
#: Its weights are merged ahead of time, so it is no peer of work on unmerged adapters.
MERGED = ("merged", "vmap-merged")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw the rows of results files.")
    parser.add_argument("file", nargs="*", type=Path, help=f"default: every file in {RESULTS.name}/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the pictures")
    options = parser.parse_args(arguments)
    files = options.file or sorted(RESULTS.glob("*.jsonl"))
    if not files:
        parser.error("there are no results yet; make some with: python -m benchmarks --out benchmarks/results/")
    options.out.mkdir(parents=True, exist_ok=True)
    for file in files:
        for picture in draw(report.read(file), options.out / file.stem):
            print(picture)
    return 0


def draw(rows: Sequence[dict], stem: Path) -> list[Path]:
    """Per op and mode a bar chart of the single cases, and a map of the grid where there is one.

    Providers replayed as CUDA graphs are compared among themselves, in pictures of their own.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if row["verified"]:
            provider, plus, _ = row["provider"].partition("+")
            kind = ("-grid" if "/grid-" in row["case"] else "") + ("-graph" if plus else "")
            groups[row["op"], row["mode"], kind].append(row | {"provider": provider})
    pictures = []
    for (op, mode, kind), members in groups.items():
        figure = _grid(members) if "-grid" in kind else _bars(members)
        figure.suptitle(f"{op} {mode} · {members[0]['device_name']} · torch {members[0]['torch']}", fontsize=10)
        picture = stem.with_name(f"{stem.name}-{op}-{mode}{kind}.png")
        figure.savefig(picture, dpi=120)
        plt.close(figure)
        pictures.append(picture)
    return pictures


def _bars(rows: Sequence[dict]) -> plt.Figure:
    """One panel a case: the providers' medians as bars, p20 to p80 as a line, the limit dashed."""
    cases = _by_case(rows)
    columns = min(len(cases), 2)
    lines = math.ceil(len(cases) / columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 2.4 * lines + 0.4), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    for panel, (case, providers) in zip(panels.flat, cases.items(), strict=False):
        ordered = sorted(providers.values(), key=lambda row: -row["median_ms"])
        ours = providers.get(OURS, {}).get("median_ms")
        for place, row in enumerate(ordered):
            median = row["median_ms"]
            spread = [[median - row["p20_ms"]], [row["p80_ms"] - median]]
            color = OUR_COLOR if row["provider"] == OURS else PEER_COLOR
            panel.barh(place, median, xerr=spread, color=color, error_kw={"elinewidth": 0.8})
            label = f" {median:.0f} ms" if median >= 100 else f" {median:.3g} ms"
            label += f" ({median / ours:.2f}×)" if ours else ""
            panel.text(row["p80_ms"], place, label, va="center", fontsize=7)
        panel.axvline(ordered[0]["limit_ms"], color="black", linestyle="--", linewidth=0.8)
        panel.set_yticks(range(len(ordered)), [row["provider"] for row in ordered], fontsize=8)
        panel.set_xlim(0, 1.35 * max(row["p80_ms"] for row in ordered))
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(case.split("/", 1)[1] + f"  {ordered[0]['dtype']}", fontsize=9, loc="left")
        panel.set_xlabel("ms (dashed: the limit)", fontsize=7)
    return figure


def _grid(rows: Sequence[dict]) -> plt.Figure:
    """Time of the best peer on unmerged adapters ÷ ours, over M and (T, r): one map a form of the input."""
    cases = _by_case(rows)
    shapes = {case: next(iter(providers.values()))["shape"] for case, providers in cases.items()}
    forms = sorted({shape["form"] for shape in shapes.values()})
    heights = sorted({shape["M"] for shape in shapes.values()})
    widths = sorted({(shape["T"], shape["r"]) for shape in shapes.values()})
    figure, panels = plt.subplots(
        1, len(forms), figsize=(1.5 + 4.2 * len(forms), 1 + 0.55 * len(heights)), squeeze=False, layout="constrained"
    )
    for panel, form in zip(panels.flat, forms, strict=True):
        ratios = [[math.nan] * len(widths) for _ in heights]
        for case, shape in shapes.items():
            if shape["form"] == form:
                ratio = _lead(cases[case])
                ratios[heights.index(shape["M"])][widths.index((shape["T"], shape["r"]))] = ratio
        panel.imshow(ratios, cmap="RdBu", norm=matplotlib.colors.LogNorm(0.5, 2), aspect="auto")
        for i, line in enumerate(ratios):
            for j, ratio in enumerate(line):
                ink = "black" if 0.65 < ratio < 1.5 else "white"
                panel.text(j, i, f"{ratio:.2f}", ha="center", va="center", fontsize=8, color=ink)
        panel.set_xticks(range(len(widths)), [f"T={t}\nr={r}" for t, r in widths], fontsize=7)
        panel.set_yticks(range(len(heights)), [f"M={m}" for m in heights], fontsize=7)
        panel.set_title(f"{form}: best unmerged peer ÷ {OURS}", fontsize=9)
    return figure


def _lead(providers: dict[str, dict]) -> float:
    peers = [row["median_ms"] for name, row in providers.items() if name not in (OURS, *MERGED)]
    return min(peers) / providers[OURS]["median_ms"] if OURS in providers and peers else math.nan


def _by_case(rows: Sequence[dict]) -> dict[str, dict[str, dict]]:
    cases: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        cases[row["case"]][row["provider"]] = row
    return cases


if __name__ == "__main__":
    sys.exit(main())
