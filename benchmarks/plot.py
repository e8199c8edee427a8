"""``python -m benchmarks.plot [FILE.jsonl …] [--out FOLDER]``: draws results, among them the pictures of the README.

Each op and mode has one picture of every provider's time, percent of the limit and peak memory, by size: rows of dots
and bars with the smallest case on top, or curves if there are many cases. One more shows what all ops hold in memory.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image

from fastcss._files import whole_file

from . import report
from .cases import OURS

RESULTS = Path(__file__).parent / "results"
OUR_COLOR, PEER_COLOR = "#1b6ca8", "#b9c4cc"
MODES = {"fwd": "forward", "bwd": "forward and backward"}
#: A mode of an op is drawn as curves if it has more cases than this.
MANY = 8

PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
#: This many panels stand beside each other.
COLUMNS = 6
MARKERS = "sD^vPX*"
MEASURES: dict[str, Callable[[dict], float]] = {
    "ms": lambda row: row["median_ms"],
    "% of the limit": lambda row: 100 * row["limit_ms"] / row["median_ms"],
    "peak MiB": lambda row: math.nan if row["peak_mib"] is None else row["peak_mib"],  # a curve has a gap there
}

Cases = dict[str, dict[str, dict]]  # case → provider → row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw the rows of results files.")
    parser.add_argument("file", nargs="*", type=Path, help=f"default: every file in {RESULTS.name}/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the pictures")
    options = parser.parse_args(arguments)
    files = options.file or sorted(RESULTS.glob("*.jsonl"))
    if not files:
        parser.error("there are no results yet; make some with: python -m benchmarks --out benchmarks/results/")
    try:
        results = {file: report.read(file) for file in files}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    stems = [options.out / file.stem for file in results]
    with ProcessPoolExecutor(min(len(stems), os.cpu_count() or 1)) as processes:  # a second a picture
        for pictures in processes.map(draw, results.values(), stems):
            print(*pictures, sep="\n")
    return 0


def draw(rows: Sequence[dict], stem: Path) -> list[Path]:
    """Write all pictures, named ``<stem>-<op>-<mode>.png`` and ``<stem>-memory.png``.

    Providers replayed as CUDA graphs are compared among themselves, in pictures of their own.
    """
    groups: dict[tuple[str, str, str], Cases] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["verified"]:
            provider, plus, _ = row["provider"].partition("+")
            groups[row["op"], row["mode"], "-graph" if plus else ""][row["case"]][provider] = row
    pictures = []
    for (op, mode, kind), found in groups.items():
        cases = dict(sorted(found.items(), key=lambda item: _limit(item[1])))
        figure = _curves(cases) if len(cases) > MANY else _bars(cases)
        title = f"{op}, {MODES[mode]}" + ", as CUDA graphs" * bool(kind)
        pictures.append(_save(figure, title, cases, stem.with_name(f"{stem.name}-{op}-{mode}{kind}.png")))
    largest = _most_memory([_with_peaks(cases) for (_, _, kind), cases in groups.items() if not kind])
    if largest:
        picture = stem.with_name(f"{stem.name}-memory.png")
        pictures.append(_save(_memory(largest), "peak memory of a call", largest, picture))
    return pictures


def _save(figure: plt.Figure, title: str, cases: Cases, picture: Path) -> Path:
    """Write a figure under a title that says what was measured, where, and when."""
    rows = [row for providers in cases.values() for row in providers.values()]
    devices, torches = ({row[name] for row in rows} for name in ("device_name", "torch"))
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    parts = (title, *sorted(devices), *(f"torch {version}" for version in sorted(torches)), when)
    figure.suptitle(" · ".join(parts), fontsize=10)
    with io.BytesIO() as drawn:
        figure.savefig(drawn, dpi=100)
        plt.close(figure)
        image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # a quarter of the bytes
    with whole_file(picture, binary=True) as file:
        image.save(file, "png", optimize=True)
    return picture


def _bars(cases: Cases) -> plt.Figure:
    """Draw one line per provider, by time, below a line with the name of its case; all three panels share the lines."""
    lines: list[tuple[str, dict | None]] = []
    for case, providers in cases.items():
        ordered = sorted(providers.values(), key=lambda row: row["median_ms"])
        lines += [(f"{case.split('/', 1)[1]}  {ordered[0]['dtype']}", None)]
        lines += [(row["provider"].partition("+")[0], row) for row in ordered]
    height = 1.3 + 0.17 * len(lines)
    figure, panels = plt.subplots(
        1, 3, sharey=True, figsize=(12, height), width_ratios=(1.5, 1, 1), layout="constrained"
    )
    places = [(place, row) for place, (_, row) in enumerate(lines) if row]
    _times(panels[0], places, cases)
    _shares(panels[1], places)
    _peaks(panels[2], places)
    panels[0].set_ylim(len(lines) - 0.4, -0.6)
    panels[0].set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=8)
    for (_, row), label in zip(lines, panels[0].get_yticklabels(), strict=True):
        label.set_fontweight("normal" if row else "bold")
    for panel in panels:
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelsize=8)
        panel.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _times(panel: plt.Axes, places: Sequence[tuple[int, dict]], cases: Cases) -> None:
    for place, row in places:
        median, ours = row["median_ms"], cases[row["case"]].get(OURS)
        panel.plot([row["p20_ms"], row["p80_ms"]], [place] * 2, color=_color(row), linewidth=4, alpha=0.5)
        panel.plot(median, place, "o", color=_color(row), markersize=5)
        panel.plot(row["limit_ms"], place, "|", color="black", markersize=8)
        ratio = f" ({median / ours['median_ms']:.2f}×)" if ours else ""
        panel.text(1.15 * row["p80_ms"], place, f"{_number(median)} ms{ratio}", va="center", fontsize=7)
    panel.set_xscale("log")
    least, most = panel.get_xlim()
    panel.set_xlim(least, most * (most / least) ** 0.4)  # room for the last label
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
    panel.xaxis.set_major_formatter(PLAIN)
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(f"ms (÷ {OURS}); line: p20 to p80; black: the limit", fontsize=8)


def _shares(panel: plt.Axes, places: Sequence[tuple[int, dict]]) -> None:
    for place, row in places:
        share = 100 * row["limit_ms"] / row["median_ms"]
        panel.barh(place, share, color=_color(row), height=0.7)
        panel.text(share + 1, place, f"{share:.0f}" if share >= 1 else f"{share:.1f}", va="center", fontsize=7)
    panel.set_xlim(0, max(105, 1.1 * panel.get_xlim()[1]))
    panel.axvline(100, color="black", linewidth=0.8)
    panel.set_xlabel("% of the limit", fontsize=8)


def _peaks(panel: plt.Axes, places: Sequence[tuple[int, dict]]) -> None:
    known = [(place, row) for place, row in places if row["peak_mib"] is not None]
    for place, row in known:
        panel.barh(place, row["peak_mib"], color=_color(row), height=0.7)
        panel.text(row["peak_mib"] * 1.08 + 0.05, place, _number(row["peak_mib"]), va="center", fontsize=7)
    _memory_axis(panel, max((row["peak_mib"] for _, row in known), default=0.0))


def _memory_axis(panel: plt.Axes, most: float) -> None:
    """Make the axis logarithmic from 1 MiB on, with a place for 0, and room for the label of the largest value."""
    panel.set_xscale("symlog", linthresh=1)
    panel.set_xlim(0, max(4.0, 4 * most**1.05))
    panel.xaxis.set_major_formatter(PLAIN)
    panel.set_xlabel("peak MiB", fontsize=8)


def _curves(cases: Cases) -> plt.Figure:
    """Draw curves over the size that takes most values, with a column of panels for each setting of the others."""
    size, settings = _settings(cases)
    ordered = sorted(settings)
    blocks = [ordered[first : first + COLUMNS] for first in range(0, len(ordered), COLUMNS)]
    figure = plt.figure(figsize=(1 + 2.2 * len(blocks[0]), 1 + 4.8 * len(blocks)), layout="constrained")
    styles = _styles(cases)
    for part, block in zip(figure.subfigures(len(blocks), 1, squeeze=False).flat, blocks, strict=True):
        panels = part.subplots(len(MEASURES), len(block), sharex=True, sharey="row", squeeze=False)
        for column, setting in zip(panels.T, block, strict=True):
            names = (value if isinstance(value, str) else f"{name}={value}" for name, value in setting)
            column[0].set_title(" ".join(names), fontsize=8)
            column[-1].set_xlabel(size, fontsize=8)
            for panel, value in zip(column, MEASURES.values(), strict=True):
                for name, style in styles.items():
                    points = [(x, value(rows[name])) for x, rows in sorted(settings[setting].items()) if name in rows]
                    panel.plot([x for x, _ in points], [y for _, y in points], **style)
        for line, label in zip(panels, MEASURES, strict=True):
            line[0].set_ylabel(label, fontsize=8)
            for panel in line:
                _dress(panel, label, sorted({x for found in settings.values() for x in found}))
    handles = [plt.Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _settings(cases: Cases) -> tuple[str, dict[tuple, dict[int, dict[str, dict]]]]:
    """Find the size that takes most values; for each setting of the others (names and values), map the values of that
    size → provider → row."""
    shapes = {case: next(iter(providers.values()))["shape"] for case, providers in cases.items()}
    first, *_ = shapes.values()
    differing = {name: len({str(shape[name]) for shape in shapes.values()}) for name in first}
    size = max((name for name in first if isinstance(first[name], int)), key=differing.__getitem__)
    others = [name for name in first if name != size and differing[name] > 1]
    settings = defaultdict(lambda: defaultdict(dict))
    for case, shape in shapes.items():
        settings[tuple((name, shape[name]) for name in others)][shape[size]] |= cases[case]
    return size, settings


def _dress(panel: plt.Axes, label: str, sizes: Sequence[int]) -> None:
    panel.set_xscale("log")
    panel.set_xticks(sizes, [f"{size}" for size in sizes])
    panel.xaxis.set_minor_locator(NullLocator())
    if label == "peak MiB":
        panel.set_yscale("symlog", linthresh=1)
    elif label == "ms":
        panel.set_yscale("log")
    if label != "ms":
        panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(PLAIN)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _styles(cases: Cases) -> dict[str, dict]:
    """Choose the style of every provider's curves; ours is drawn last."""
    names = dict.fromkeys(name for providers in cases.values() for name in providers if name != OURS)
    colors = plt.get_cmap("Set2").colors
    styles = {
        name: {"color": colors[number % len(colors)], "marker": MARKERS[number % len(MARKERS)], "markersize": 3.5}
        for number, name in enumerate(names)
    }
    return styles | {OURS: {"color": OUR_COLOR, "marker": "o", "markersize": 4, "linewidth": 2}}


def _with_peaks(cases: Cases) -> Cases:
    """Leave out the providers whose memory was not measured."""
    return {
        case: {name: row for name, row in providers.items() if row["peak_mib"] is not None}
        for case, providers in cases.items()
    }


def _most_memory(groups: Sequence[Cases]) -> Cases:
    """Pick for each op and mode the case in which some peer holds most beyond what ours holds."""
    found = {}
    for cases in groups:
        wasted = {
            case: max(row["peak_mib"] for row in providers.values()) - providers[OURS]["peak_mib"]
            for case, providers in cases.items()
            if OURS in providers and len(providers) > 1
        }
        if wasted:
            case = max(wasted, key=wasted.__getitem__)
            mode = next(iter(cases[case].values()))["mode"]
            found[f"{case}, {MODES[mode]}"] = cases[case]
    return found


def _memory(cases: Cases) -> plt.Figure:
    """Draw one line per op and mode: ours, all peers, and the name of the peer that holds most."""
    figure, panel = plt.subplots(figsize=(12, 1.2 + 0.22 * len(cases)), layout="constrained")
    for place, providers in enumerate(cases.values()):
        peaks = {name: row["peak_mib"] for name, row in providers.items()}
        panel.plot(list(peaks.values()), [place] * len(peaks), color=PEER_COLOR)
        for row in sorted(providers.values(), key=lambda row: row["provider"] == OURS):
            panel.plot(row["peak_mib"], place, "o", color=_color(row), markersize=6)
        most = max((name for name in peaks if name != OURS), key=peaks.__getitem__)
        label = f"{OURS} {_number(peaks[OURS])}, {most} {_number(peaks[most])}"
        panel.text(max(peaks.values()) * 1.15 + 0.1, place, label, va="center", fontsize=7)
    panel.set_yticks(range(len(cases)), list(cases), fontsize=8)
    panel.set_ylim(len(cases) - 0.4, -0.6)
    panel.spines[["top", "right"]].set_visible(False)
    _memory_axis(panel, 5 * max(row["peak_mib"] for providers in cases.values() for row in providers.values()))
    panel.set_xlabel(f"peak MiB; blue: {OURS}, grey: the others", fontsize=8)
    return figure


def _color(row: dict) -> str:
    return OUR_COLOR if row["provider"].partition("+")[0] == OURS else PEER_COLOR


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _limit(providers: dict[str, dict]) -> float:
    return next(iter(providers.values()))["limit_ms"]


if __name__ == "__main__":
    sys.exit(main())
