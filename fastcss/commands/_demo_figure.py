"""Draws the demo's figure: some scenes, what is in them, what was found, and how long each way takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ._demo_measurement import WAYS, Figures, Scene
from ._overlay import painted, palette
from ._tables import counted, learned_in, percent

ROWS = ("a photograph with\nhandwritten digits", "what is in it", "what the model\nfinds in one pass")
OURS, OTHERS, INK = "#1b6ca8", "#b9c4cc", "#555555"
SIDE, MARGIN, LEGEND = 2.35, 0.75, 3.6  # inches
SPECK = 0.005  # share of the picture; smaller regions get no name


def draw(scenes: Sequence[Scene], figures: Figures, labels: Sequence[str], count: int) -> Figure:
    """Draw what was measured on ``count`` scenes; ``labels`` are the data set's, the background first."""
    widths = (MARGIN + SIDE * len(scenes), LEGEND)
    figure = Figure(figsize=(sum(widths), 3.4 * SIDE), layout="constrained")
    FigureCanvasAgg(figure)
    classes = sum(len(task.classes) for task in figures.tasks)
    figure.suptitle(
        f"{learned_in(classes, len(figures.tasks))}\n"
        f"mIoU {percent(figures.miou['one_pass'])}% on {counted(count, 'scene')}, in handwriting it has not seen",
        fontsize=13,
    )
    left, right = figure.subfigures(1, 2, width_ratios=widths)
    _scenes(left.subplots(len(ROWS), len(scenes), squeeze=False), scenes, labels)
    top, bottom = right.subplots(2, 1)
    _legend(top, figures, labels)
    _bars(bottom, figures)
    return figure


def _scenes(panels: np.ndarray, scenes: Sequence[Scene], labels: Sequence[str]) -> None:
    for column, scene in zip(panels.T, scenes, strict=True):
        column[0].imshow(scene.image.permute(1, 2, 0).clamp(0, 1).numpy())
        # The picture is pale and grey, because the digits' own colours would mix with those of the labels.
        pale = 0.5 + 0.5 * scene.image.mean(0, keepdim=True).expand(3, -1, -1)
        for panel, of in zip(column[1:], (scene.labels, scene.found), strict=True):
            panel.imshow(painted(pale, of), extent=(0, of.shape[1], of.shape[0], 0))
            for label, count in zip(*(found.tolist() for found in of.unique(return_counts=True)), strict=True):
                if label and count > SPECK * of.numel():
                    _name(panel, (of == label).numpy(), labels[label], _colour(label))
    for row, title in zip(panels, ROWS, strict=True):
        row[0].set_ylabel(title, fontsize=12)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])


def _name(panel: Axes, where: np.ndarray, name: str, colour: np.ndarray) -> None:
    """Write a class's name at the top of its region ``where``, bool [H, W]."""
    top = where.any(1).argmax()
    place = (where[top].nonzero()[0].mean().clip(16, where.shape[1] - 16), max(top - 2, 9))  # stays in the picture
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colour, "alpha": 0.85}
    panel.text(*place, name, fontsize=9, ha="center", va="bottom", bbox=box)


def _legend(panel: Axes, figures: Figures, labels: Sequence[str]) -> None:
    handles = []
    for t, task in enumerate(figures.tasks, 1):
        for label in map(labels.index, task.classes):
            text = f"{labels[label]}: task {t}, {percent(figures.iou[label])}%"
            handles.append(Patch(color=_colour(label), label=text))
    panel.legend(handles=handles, title="class: when learned, IoU", loc="center", frameon=False, fontsize=11)
    panel.set_axis_off()


def _bars(panel: Axes, figures: Figures) -> None:
    median, least, most = 1000 * np.array([figures.times[mode] for mode in WAYS]).T
    names = [name.replace(" ", "\n", 1) for name in WAYS.values()]
    colours = [OURS, *[OTHERS] * (len(names) - 1)]
    panel.bar(names, median, color=colours, yerr=(median - least, most - median), ecolor=INK, capsize=3)
    for place, (middle, high) in enumerate(zip(median, most, strict=True)):
        ratio = f"\n{middle / median[0]:.2f}×" if place else ""
        panel.text(place, high, f"{middle:.0f} ms{ratio}", ha="center", va="bottom", fontsize=11)
    panel.set_title(f"time of a picture, {len(figures.tasks)} tasks", fontsize=12)
    panel.set(ylim=(0, 1.25 * most.max()), yticks=[])
    panel.spines[["top", "right", "left"]].set_visible(False)


def _colour(label: int) -> np.ndarray:
    return palette()[label] / 255
