"""Cases of ``AdapterPool``: a thousand adapters on disk, a tenth of them in memory, and a skewed stream of batches.

Which adapter a sample wants is drawn after Zipf's law (the k-th most wanted with a probability of 1 / k). A step is
seven batches of a stream that goes on from step to step, and an eighth that is always the same, whose outputs are
compared. "all-in-memory" has a budget for all adapters and has read them before. "fastcss" prefetches each next batch.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastcss

from .cases import Case, Problem, Step
from .one_pass import SOURCES

ADAPTERS, IN_MEMORY, BATCH, BATCHES, RANK = 1000, 100, 16, 8, 16
SITES = ("q_proj", "v_proj")


def cases(device: str, quick: bool) -> list[Case]:
    count, budget = (20, 18) if quick else (ADAPTERS, IN_MEMORY)
    shape = {"T": count, "in_memory": budget, "B": BATCH, "batches": BATCHES, "r": RANK}
    shape |= {"width": 32 if quick else 384, "layers": 2 if quick else 6}
    name = f"pool/{count}-adapters" + "-quick" * quick
    build = functools.partial(_problem, shape)
    return [Case("pool", name, shape, torch.float32, build, SOURCES, modes=("fwd",), by_name=not quick)]


def _problem(shape: dict, device: str, mode: str) -> Problem:
    model, pixels = _vit(shape).to(device), torch.randn(shape["B"], 3, 64, 64, device=device)
    place = tempfile.TemporaryDirectory()  # gone with the problem
    folders = write_folders(Path(place.name), model, shape["T"], shape["r"])
    size = sum(2 * m.weight.shape[0] * shape["r"] * 4 for n, m in model.named_modules() if n.endswith(SITES))
    probe = [folder.name for folder in folders[: shape["B"]]]

    def pool(adapters: int) -> fastcss.AdapterPool:
        made = fastcss.AdapterPool(model, folders, budget=adapters * size)
        made.place = place
        return made

    def step_of(adapters: int, prefetches: bool) -> Step:
        made, stream = pool(adapters), routes(shape, [folder.name for folder in folders])
        for first in range(0, adapters, shape["B"]):  # fill the memory: it is the long run that counts
            names = [folders[t].name for t in range(first, min(first + shape["B"], adapters))]
            made(pixels[: len(names)], route=names)

        def step() -> Sequence[Tensor]:
            batches = [*(next(stream) for _ in range(shape["batches"] - 1)), probe]
            for route, coming in zip(batches, [*batches[1:], ()], strict=True):
                if prefetches and coming:
                    made.prefetch(coming)
                output = made(pixels, route=route).last_hidden_state
            return (output,)

        return torch.no_grad()(step)

    def expected() -> Sequence[Tensor]:
        runner = fastcss.one_pass.from_directories(model, folders[: shape["B"]], engine="replay", fuse=False)
        with torch.no_grad():
            return (runner(pixels, route=probe).last_hidden_state,)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step_of(shape["in_memory"], True),
        "no-prefetch": lambda: step_of(shape["in_memory"], False),
        "all-in-memory": lambda: step_of(shape["T"], False),
    }
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(pixels)
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    return Problem(providers, expected, 1e-5, counter.get_total_flops() * shape["batches"], weights)


def routes(shape: dict, names: list[str]) -> Iterator[list[str]]:
    """Yield one batch of the stream after the other."""
    generator = torch.Generator().manual_seed(0)
    wanted = 1 / torch.arange(1, len(names) + 1)
    order = torch.randperm(len(names), generator=generator)
    while True:
        drawn = torch.multinomial(wanted, shape["B"], replacement=True, generator=generator)
        yield [names[t] for t in order[drawn].tolist()]


def _vit(shape: dict) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    width = shape["width"]
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=shape["layers"], num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width, image_size=64, patch_size=8,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False).eval()


def write_folders(place: Path, model: nn.Module, count: int, rank: int) -> list[Path]:
    """Write ``count`` adapter folders as PEFT saves them."""
    from safetensors.torch import save_file

    layers = {name: module for name, module in model.named_modules() if name.endswith(SITES)}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(SITES)}
    folders = [place / f"adapter{t}" for t in range(count)]
    for folder in folders:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for name, layer in layers.items():
            (n, k), key = layer.weight.shape, f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, k) * k**-0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(n, rank) * 0.1
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folders
