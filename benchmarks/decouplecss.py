"""Cases of DecoupleCSS: one picture through detector, prompt generators and SAM, with the classes of six tasks.

"fastcss" runs every task's adapter in one pass. "shared" switches the adapters and does the rest once per picture.
"literal" does everything once per task and decodes every prompt by itself, as published.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from . import _steps, one_pass
from .cases import Case, Problem, Step
from .merge_masks import differing

TASKS, CLASSES, PHRASES = 6, 3, 31
TOLERANCE = 1e-4  # of the pixels: the specification's 99.99%
MODES = {"fastcss": "one_pass", "shared": "shared", "literal": "literal"}
SOURCES = ("fastcss/models/*.py", *one_pass.SOURCES)

#: The sizes of both models and where the adapters sit; τ, chosen so that a picture of noise shows some classes and not
#: others; the sizes of a class's tokens and of its generator; the adapters' rank; and the picture's size.
TINY = {"detector": "tiny", "sam": "tiny", "tau": 0.3, "length": 128, "hidden": 64, "r": 8, "H": 96, "W": 128}
TINY |= {"sites": "swin+fusion"}
SMALL = {"detector": "swin-t", "sam": "vit-b", "tau": 0.05, "length": 512, "hidden": 1024, "r": 32, "H": 480, "W": 640}
SMALL |= {"sites": "swin+fusion"}
#: The published system's models at full size, as its figures of storage tell.
FULL = SMALL | {"detector": "swin-b", "sam": "vit-h", "sites": "fusion"}


def cases(device: str, quick: bool) -> list[Case]:
    """List the models in float32 on every device: rounding would decide in half precision which tokens a class gets."""
    points = {"tiny": TINY} if quick else {"tiny": TINY, "swin-t-vit-b": SMALL, "swin-b-vit-h": FULL}
    found = []
    for name, sizes in points.items():
        shape = sizes | {"T": TASKS, "classes": CLASSES}
        name = f"decouplecss/{name}-t{TASKS}" + "-quick" * quick
        build = functools.partial(_problem, shape)
        long = shape["sam"] != "tiny" and device == "cpu"
        found.append(Case("decouplecss", name, shape, torch.float32, build, SOURCES, modes=("fwd",), by_name=long))
    return found


def _problem(shape: dict, device: str, mode: str) -> Problem:
    model = random_model(shape).to(device)
    inputs = _picture(shape, model.segmenter.image_size, device)

    def step(mode: str) -> Step:
        return lambda: (model.segment(**inputs, mode=mode).labels[0],)

    steps = {name: step(mode) for name, mode in MODES.items()}
    providers: dict[str, Callable[[], Step]] = {name: lambda name=name: steps[name] for name in MODES}
    if device == "cuda":
        providers["triton"] = lambda: _steps.on("triton", step("one_pass"))
    counter = FlopCounterMode(display=False)
    steps["shared"]()  # the phrases are embedded in the first call
    with counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own attention is none that the counter knows
        steps["shared"]()
    text = ("text_backbone", "text_projection")
    read = [p for name, p in model.named_parameters() if not any(part in name for part in text)]
    weights = sum(p.numel() * p.itemsize for p in read)
    return Problem(providers, steps["literal"], TOLERANCE, counter.get_total_flops(), weights, differing, _no_graph)


def random_model(shape: dict) -> nn.Module:
    """Build a model with random weights, adapters and tasks."""
    from fastcss.models.class_detector import ClassDetector
    from fastcss.models.decouplecss import DecoupleCSS, Phrases
    from fastcss.models.sam import SamSegmenter

    model = DecoupleCSS(
        ClassDetector.random(shape["detector"]),
        SamSegmenter.random(shape["sam"]),
        threshold=shape["tau"],
        length=shape["length"],
        hidden=shape["hidden"],
        rank=shape["r"],
        alpha=shape["r"],
        sites=shape["sites"],
    )
    generator = torch.Generator().manual_seed(0)
    for task in range(shape["T"]):
        names = [f"class {task}.{k}" for k in range(shape["classes"])]
        ids = torch.randint(1000, 2000, (len(names), PHRASES, 6), generator=generator)
        model.add_task(names, Phrases(ids, torch.ones_like(ids)))
    for name, parameter in model.detector.named_parameters():
        if "lora_" in name:  # B too: as zeros it does nothing
            scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.1
            parameter.data.normal_(0, scale, generator=generator)
    return model.eval()


def _picture(shape: dict, side: int, device: str) -> dict:
    """Make the arguments of ``segment`` for a picture of noise: SAM's copy fills its longer side, zeros the rest."""
    height, width = shape["H"], shape["W"]
    rows, columns = (size * side // max(height, width) for size in (height, width))
    pixels = _steps.normal(1, 3, height, width, dtype=torch.float32, device=device)
    sam_pixels = torch.zeros(1, 3, side, side, device=device)
    sam_pixels[..., :rows, :columns] = _steps.normal(1, 3, rows, columns, dtype=torch.float32, device=device)
    return {
        "pixel_values": pixels,
        "sam_pixel_values": sam_pixels,
        "sizes": [(height, width)],
        "crops": [(rows, columns)],
    }


def _no_graph(provider: str, step: Step) -> Step:
    raise RuntimeError("how many classes are present is read back, which no CUDA graph can hold")
