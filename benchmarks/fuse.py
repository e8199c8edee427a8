"""Cases of ``fuse``: one pass of the Grounding DINO encoder over a picture and six phrases, as it is and fused.

"eager" is the model as transformers builds it, with Swin's and BERT's attention on SDPA. "attention only" is fused
except for its linear layers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastcss
from fastcss._fuse.fusion import fuse_modules

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value, which comes from the model itself in float64. float32 has the
# specification's 1e-5; bfloat16 has 8 bits in each of some sixty layers.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1}
SOURCES = ("fastcss/_fuse/*.py", "fastcss/_ops/*.py", "fastcss/composed/*.py")


def cases(device: str, quick: bool) -> list[Case]:
    """List the point of the specification; the picture is 800 × 1066 on a GPU."""
    size, height, width, dtype = "swin-t", 480, 640, torch.float32
    if device == "cuda":
        height, width, dtype = 800, 1066, torch.bfloat16
    name = f"fuse/grounding-dino-{height}x{width}"
    if quick:
        name, size, height, width = f"{name}-quick", "tiny", 96, 128
    shape = {"model": size, "B": 1, "H": height, "W": width}
    build = functools.partial(_problem, shape, dtype, quick)
    return [Case("fuse", name, shape, dtype, build, SOURCES, modes=("fwd",))]


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    from fastcss.models.grounding_dino import GroundingDinoEncoder, phrases_to_ids

    model = GroundingDinoEncoder.random(shape["model"]).to(device, dtype)
    pixels = _steps.normal(shape["B"], 3, shape["H"], shape["W"], dtype=dtype, device=device)
    text = phrases_to_ids()[0].to(device).expand(shape["B"], -1)
    tensors = [*model.parameters(), *model.buffers()]

    def step(model: Callable, pixels: Tensor = pixels) -> Step:
        def run():
            output = model(pixel_values=pixels, input_ids=text)
            return output.last_hidden_state_vision, output.last_hidden_state_text

        return torch.no_grad()(run)

    def fused(fuse: Callable[[nn.Module], object]) -> Step:
        copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        fuse(copied)
        return step(copied)

    providers: dict[str, Callable[[], Step]] = {"fastcss": lambda: fused(fastcss.fuse), "eager": lambda: step(model)}
    if device == "cpu":  # the linear layers of a GPU are torch's in any case
        providers["attention only"] = lambda: fused(functools.partial(fuse_modules, linears=False))
    else:
        providers["triton"] = lambda: _steps.on("triton", fused(fastcss.fuse))
    if not quick and device == "cuda":  # a CPU's compiles for a minute, and is slower than eager
        providers["compiled"] = lambda: step(torch.compile(model))

    def expected():
        return step(copy.deepcopy(model).double(), pixels.double())()

    counter = FlopCounterMode(display=False)
    with counter:
        step(model)()
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    capture = _steps.capture_with([text, *tensors])
    return Problem(providers, expected, TOLERANCE[dtype], counter.get_total_flops(), weights, capture=capture)
