"""``python -m benchmarks.train_caa [--seeds 0 1 2] [--steps N] [--out FILE.jsonl]``: does class-aware affinity help?

Trains a small FCN on digit scenes, then goes on in two arms: with the FCN as it is, and with ``ClassAwareAffinity``
between its features and its segmentation layer. Both arms start from the same weights, as the thesis starts from
pretrained backbones, and see the same scenes in the same order, with the same optimiser and as many steps. Exit code 1:
the module did not improve the mean IoU of held-out scenes on some seed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fastcss.data import CLASSES, DigitScenes
from fastcss.nn import ClassAwareAffinity

from . import harness

ARMS = ("FCN", "FCN + CAA")
AUX_WEIGHT = 0.4

Scenes = tuple[Tensor, Tensor]  #: images and labels


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds the settings, which are the same for both arms."""

    start_steps: int = 1500  # without the module, once for both arms
    start_lr: float = 3e-3
    steps: int = 400
    lr: float = 2e-3
    batch: int = 8
    channels: int = 96
    weight_decay: float = 1e-2
    train_scenes: int = 2000
    test_scenes: int = 400
    impl: str = "auto"


class FCN(nn.Module):
    """Has four convolutions to stride 8, one before the segmentation layer, and an auxiliary head half-way; CAA is
    added by ``add_context``.

    A feature sees 47 pixels of the scene, about the size of a digit.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, channels // 4, 2), conv(channels // 4, channels // 2, 2))
        self.stage = nn.Sequential(conv(channels // 2, channels, 2), conv(channels, channels))
        self.head = conv(channels, channels)
        self.aux = nn.Sequential(conv(channels, channels // 2), nn.Conv2d(channels // 2, len(CLASSES), 1))
        self.segmentation = nn.Conv2d(channels, len(CLASSES), 1)
        self.context: ClassAwareAffinity | None = None

    def add_context(self, impl: str) -> None:
        """Add class-aware affinity, which keeps the segmentation layer that is there."""
        channels = self.segmentation.in_channels
        self.context = ClassAwareAffinity(
            channels, len(CLASSES), key_channels=channels // 2, attention_channels=channels // 2, impl=impl
        )
        self.context.segmentation = self.segmentation

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, C, H/8, W/8]."""
        features = self.head(self.stage(self.stem(images)))
        return self.segmentation(features) if self.context is None else self.context(features).logits

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        middle = self.stage(self.stem(images))
        features, aux = self.head(middle), AUX_WEIGHT * cross_entropy(self.aux(middle), labels)
        if self.context is None:
            return cross_entropy(self.segmentation(features), labels) + aux
        return self.context.loss(self.context(features), labels).total + aux


def conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels)


def train(model: FCN, scenes: Scenes, steps: int, lr: float, seed: int, settings: Settings, advance: Callable) -> None:
    """Train by AdamW with a polynomial schedule; the order of the scenes follows from ``seed``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    model.train()
    for images, labels in batches(scenes, steps, settings.batch, seed):
        optimizer.zero_grad()
        model.loss(images, labels).backward()
        optimizer.step()
        schedule.step()
        advance()
    model.eval()


def batches(scenes: Scenes, steps: int, batch: int, seed: int) -> Iterator[Scenes]:
    """Yield shuffled scenes; the order follows from the seed alone."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(scenes[0]), generator=generator)])
        chosen, order = order[:batch], order[batch:]
        yield _floats(scenes[0][chosen]), scenes[1][chosen].long()


def rendered(scenes: DigitScenes, advance: Callable) -> Scenes:
    """Render all images and labels, as uint8."""
    images, labels = [], []
    for image, label in scenes:
        images.append((image * 255).round().byte())
        labels.append(label.byte())
        advance()
    return torch.stack(images), torch.stack(labels)


def _floats(images: Tensor) -> Tensor:
    return images / 127.5 - 1


@torch.no_grad()
def iou(model: FCN, scenes: Scenes) -> Tensor:
    """Compute the intersection over union of each class over all pixels of all scenes: [C], float64."""
    classes = len(CLASSES)
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    for images, labels in zip(*(part.split(50) for part in scenes), strict=True):
        logits = F.interpolate(model(_floats(images)), labels.shape[1:], mode="bilinear")
        counts += torch.bincount((labels * classes + logits.argmax(1)).flatten(), minlength=classes * classes)
    confusion = counts.view(classes, classes).double()
    hit = confusion.diagonal()
    return hit / (confusion.sum(0) + confusion.sum(1) - hit).clamp(min=1)


def run(seeds: Sequence[int], settings: Settings, console: Console) -> Iterator[dict]:
    """Train and test both arms on every seed, and yield a row for each as it is finished."""
    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def bar(title: str, total: int) -> Callable:
            task = progress.add_task(title, total=total)
            return lambda: progress.advance(task)

        test = rendered(DigitScenes("test", settings.test_scenes), bar("test scenes", settings.test_scenes))
        for seed in seeds:
            drawn = DigitScenes("train", settings.train_scenes, seed=seed)
            scenes = rendered(drawn, bar(f"scenes, seed {seed}", settings.train_scenes))
            torch.manual_seed(seed)
            start = FCN(settings.channels)
            advance = bar(f"start, seed {seed}", settings.start_steps)
            train(start, scenes, settings.start_steps, settings.start_lr, seed, settings, advance)
            at_start = iou(start, test).mean().item()
            for arm in ARMS:
                model, began = copy.deepcopy(start), time.perf_counter()
                if arm == ARMS[1]:
                    model.add_context(settings.impl)
                advance = bar(f"{arm}, seed {seed}", settings.steps)
                train(model, scenes, settings.steps, settings.lr, seed + 1, settings, advance)
                seconds = time.perf_counter() - began
                figures = {"seconds": round(seconds, 2), "miou_at_start": at_start}
                yield _row(arm, seed, settings, model, iou(model, test), figures)


def _row(arm: str, seed: int, settings: Settings, model: FCN, ious: Tensor, figures: dict) -> dict:
    row = {"benchmark": "train_caa", "arm": arm, "seed": seed} | dataclasses.asdict(settings)
    row |= {"parameters": sum(p.numel() for p in model.parameters())} | figures
    row |= {"miou": ious.mean().item(), "iou": dict(zip(CLASSES, ious.tolist(), strict=True))}
    row |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "device_name": harness.device_name("cpu")}
    return row | {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def pairs(rows: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Pair the rows of the two arms of each seed."""
    by_arm = [[row for row in rows if row["arm"] == arm] for arm in ARMS]
    return list(zip(*by_arm, strict=True))


def show(rows: Sequence[dict], console: Console) -> None:
    first = rows[0]
    steps = f"{first['start_steps']} common steps and {first['steps']} of each arm, batch {first['batch']}"
    title = f"mIoU (%) of {first['test_scenes']} test scenes after {steps}"
    table = Table("seed", title=title)
    for name in ("start", *ARMS, "difference", *(f"{arm}, s" for arm in ARMS)):
        table.add_column(name, justify="right")
    for base, ours in pairs(rows):
        score = [base["miou"], ours["miou"], ours["miou"] - base["miou"]]
        cells = [f"{100 * score[0]:.2f}", f"{100 * score[1]:.2f}", f"{100 * score[2]:+.2f}"]
        cells.insert(0, f"{100 * base['miou_at_start']:.2f}")
        table.add_row(str(base["seed"]), *cells, f"{base['seconds']:.0f}", f"{ours['seconds']:.0f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_caa", description=__doc__.partition("\n")[2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, scenes and their order")
    parser.add_argument(
        "--start-steps", type=int, default=defaults.start_steps, help="without the module, for both arms"
    )
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of each arm from there")
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--lr", type=float, default=defaults.lr, help="of both arms")
    parser.add_argument("--scenes", type=int, default=defaults.train_scenes, help="to train on")
    parser.add_argument("--test-scenes", type=int, default=defaults.test_scenes)
    parser.add_argument("--impl", default=defaults.impl, help="implementation of the ops")
    parser.add_argument("--out", type=Path, help="JSONL file to append the rows to")
    options = parser.parse_args(arguments)
    settings = dataclasses.replace(
        defaults,
        **{name: getattr(options, name) for name in ("start_steps", "steps", "batch", "lr", "test_scenes", "impl")},
        train_scenes=options.scenes,
    )
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in run(options.seeds, settings, console):
        rows.append(row)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    show(rows, console)
    return 0 if all(ours["miou"] > base["miou"] for base, ours in pairs(rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
