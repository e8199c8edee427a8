"""``python -m fastcss demo``: six adapters on one photograph, switched one after another and in one pass."""

from __future__ import annotations

import argparse
import copy
import math
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ._malloc import tune_malloc
from .one_pass import one_pass

TASKS, RANK, ROUNDS = 6, 32, 2
#: What the tasks look for where a checkpoint brings a tokenizer; random weights know no words.
WORDS = ("sky", "roof", "tree", "stone wall", "garden", "person")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder of a Grounding DINO checkpoint (default: Swin-T with random weights)")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="the picture to write")
    parser.add_argument("--tune-malloc", action="store_true", help="keep freed memory in the process, for both sides")


def run(out: Path, model: str | None = None, tuned: bool = False, size: str = "swin-t", height: int = 320) -> dict:
    """Run the demo; → the figures it prints."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    malloc = "glibc keeps freed memory" if tuned and tune_malloc() else "the C library's default"
    console.print(
        f"[bold]{TASKS} adapters of rank {RANK}, one photograph[/bold]; memory setting of both sides: {malloc}"
    )
    picture = _photograph(height)
    encoder, ids, spans, titles, weights = _encoder(model, size)
    console.print(f"Grounding DINO encoder, {weights}; picture {height}×{picture.shape[-1]}")
    inputs = {"pixel_values": _normalised(picture), "input_ids": ids}

    with tempfile.TemporaryDirectory() as folder:
        folders = _save_adapters(encoder, Path(folder))
        sequential = _switching(copy.deepcopy(encoder), folders)
        runner = one_pass.from_directories(encoder, folders)
    sides = {"switching adapters": lambda: _switch(sequential, inputs), "one pass": lambda: runner(**inputs)}

    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    flops, outputs, seconds = {}, {}, {name: [] for name in sides}
    with torch.no_grad(), Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(name, total=ROUNDS + 1) for name in sides}
        for side, forward in sides.items():  # the first round warms up and counts
            with FlopCounterMode(display=False) as counter:
                outputs[side] = forward()
            flops[side] = counter.get_total_flops()
            progress.advance(bars[side])
        for _ in range(ROUNDS):
            for side, forward in sides.items():
                start = time.perf_counter()
                forward()
                seconds[side].append(time.perf_counter() - start)
                progress.advance(bars[side])

    figures = _figures(seconds, flops, outputs)
    _print(console, figures)
    maps = _affinity_maps(outputs["one pass"], spans, picture.shape[-2:])
    _draw(out, picture, maps, titles, figures, weights)
    console.print(f"affinity maps: [bold]{out}[/bold]")
    return figures


def _photograph(height: int) -> Tensor:
    """scikit-learn's photograph of a Chinese temple, [3, height, width] in 0…1."""
    from sklearn.datasets import load_sample_image

    picture = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255
    width = round(height * picture.shape[-1] / picture.shape[-2])
    return nn.functional.interpolate(picture, (height, width), mode="bilinear", antialias=True)[0]


def _normalised(picture: Tensor) -> Tensor:
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return ((picture - mean) / deviation)[None]


def _encoder(folder: str | None, size: str) -> tuple[nn.Module, Tensor, list[slice], list[str], str]:
    """The encoder, its text, where in it each task's phrase stands, the phrases' names, and a word on the weights."""
    from .models.grounding_dino import EXAMPLE_PHRASES, GroundingDinoEncoder, phrases_to_ids

    if folder is None:
        ids, spans = phrases_to_ids(EXAMPLE_PHRASES)
        titles = [f"task {t + 1}" for t in range(TASKS)]
        return GroundingDinoEncoder.random(size), ids, spans, titles, "random weights and arbitrary text"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    phrases = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS]
    ids, spans = phrases_to_ids(phrases)
    titles = [f"task {t + 1}: {word}" for t, word in enumerate(WORDS)]
    return GroundingDinoEncoder.from_folder(folder), ids, spans, titles, f"weights of {folder}, random adapters"


def _save_adapters(encoder: nn.Module, folder: Path) -> list[Path]:
    """Six adapters as PEFT writes them, one folder each."""
    from .models.grounding_dino import add_adapters

    model = add_adapters(copy.deepcopy(encoder), TASKS, RANK)
    model.save_pretrained(folder)
    return [folder / f"task{t}" for t in range(TASKS)]


def _switching(encoder: nn.Module, folders: list[Path]) -> nn.Module:
    """What a PEFT user has today: one model with every adapter loaded."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(encoder, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    return model.eval()


def _switch(model: nn.Module, inputs: dict[str, Tensor]):
    outputs = []
    for t in range(TASKS):
        model.set_adapter(f"task{t}")
        outputs.append(model(**inputs))
    return type(outputs[0])(**{key: torch.stack([output[key] for output in outputs]) for key in outputs[0]})


def _figures(seconds: dict[str, list[float]], flops: dict[str, int], outputs: dict) -> dict:
    """Times are the best of the rounds. Of T tasks in turn and in one pass follow the FLOPs shared and per task."""
    in_turn, together = outputs.values()
    difference = max((in_turn[key] - together[key]).abs().max().item() for key in in_turn)
    per_task = (flops["one pass"] - flops["switching adapters"] / TASKS) / (TASKS - 1)
    return {
        "switching_s": min(seconds["switching adapters"]),
        "one_pass_s": min(seconds["one pass"]),
        "difference": difference,
        "gflop_per_task": per_task / 1e9,
        "gflop_shared": (flops["switching adapters"] / TASKS - per_task) / 1e9,
    }


def _print(console, figures: dict) -> None:
    from rich.table import Table

    switching, together = figures["switching_s"], figures["one_pass_s"]
    shared, per_task = figures["gflop_shared"], figures["gflop_per_task"]
    table = Table("", "seconds", "GFLOP", title=f"{TASKS} tasks, best of {ROUNDS}, {torch.get_num_threads()} threads")
    table.add_row("switching adapters", f"{switching:.2f}", f"{TASKS * (shared + per_task):.0f}")
    table.add_row("one pass", f"{together:.2f}", f"{shared + TASKS * per_task:.0f}")
    table.add_row("ratio", f"{switching / together:.2f}×", f"{shared:.0f} shared + {TASKS} × {per_task:.0f}")
    console.print(table)
    console.print(f"largest difference of any output: {figures['difference']:.1e}")


def _affinity_maps(output, spans: list[slice], size: tuple[int, int]) -> Tensor:
    """Cosine similarity of every image token of the finest level to its task's phrase, over the picture: [T, H, W]."""
    rows, columns = (math.ceil(length / 8) for length in size)  # the finest level has stride 8
    image = output.last_hidden_state_vision[:, 0, : rows * columns]  # [T, N, D]
    text = output.last_hidden_state_text[:, 0]
    phrases = torch.stack([text[t, span].mean(0) for t, span in enumerate(spans)])  # [T, D]
    affinity = nn.functional.cosine_similarity(image, phrases[:, None], dim=-1).unflatten(1, (rows, columns))
    return nn.functional.interpolate(affinity[None], size, mode="bilinear")[0]


def _draw(out: Path, picture: Tensor, maps: Tensor, titles: list[str], figures: dict, weights: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4).flat
    image = picture.permute(1, 2, 0).clamp(0, 1).numpy()
    gray = image.mean(-1)
    next_panel = next(panels)
    next_panel.imshow(image)
    next_panel.set_title("the photograph")
    for title, affinity in zip(titles, maps.numpy(), strict=True):
        panel = next(panels)
        panel.imshow(gray, cmap="gray")
        shown = panel.imshow(affinity, cmap="viridis", alpha=0.65)
        figure.colorbar(shown, ax=panel, shrink=0.75)
        panel.set_title(title)
    bars = next(panels)
    times = [figures["switching_s"], figures["one_pass_s"]]
    bars.bar(["switching\nadapters", "one pass"], times, color=["#b9c4cc", "#1b6ca8"])
    for place, value in enumerate(times):
        bars.text(place, value, f"{value:.2f} s", ha="center", va="bottom")
    bars.set_title(f"six tasks: {times[0] / times[1]:.2f}×")
    bars.spines[["top", "right"]].set_visible(False)
    for panel in figure.axes[:7]:
        panel.set_axis_off()
    figure.suptitle(f"Affinity of each image token to its task's phrase (Grounding DINO encoder, {weights})")
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")  # renamed: a killed demo leaves no half picture
    figure.savefig(whole, dpi=90)
    whole.replace(out)
