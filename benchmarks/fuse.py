"""Cases of ``fuse``: one pass of a whole model over a picture, as it is and fused.

The models are the Grounding DINO encoder, with six phrases, and SAM's image encoder. "eager" is a model as transformers
builds it, with attention on SDPA. "attention only" is fused except for its linear layers. "onnxruntime" and "openvino"
run the same model on a CPU, exported to ONNX.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastcss
from fastcss._fuse.fusion import fuse_modules

from . import _grounding_dino, _onnx, _onnx_runtime, _openvino, _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value, which comes from the model itself in float64. float32 has the
# specification's 1e-5; bfloat16 has 8 bits in each of some sixty layers.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1}
SOURCES = ("fastcss/_fuse/*.py", "fastcss/_ops/*.py", "fastcss/composed/*.py")
#: Width, layers and heads of a ViT for tests, whose map of 10² is filled up to windows of 4², as 64² is to 14².
TINY = (64, 2, 2)


def cases(device: str, quick: bool) -> list[Case]:
    """List the points of the specification; Grounding DINO's picture is 800 × 1066 on a GPU."""
    size, height, width, dtype = "swin-t", 480, 640, torch.float32
    if device == "cuda":
        height, width, dtype = 800, 1066, torch.bfloat16
    name = f"fuse/grounding-dino-{height}x{width}"
    if quick:
        name, size, height, width = f"{name}-quick", "tiny", 96, 128
    shape = {"model": size, "B": 1, "H": height, "W": width}
    build = functools.partial(_grounding_dino_problem, shape, dtype, quick)
    found = [Case("fuse", name, shape, dtype, build, SOURCES, modes=("fwd",))]
    for size in ("vit-b",) if quick else ("vit-b", "vit-h"):
        side = 160 if quick else 1024
        shape = {"model": "tiny" if quick else size, "B": 1, "H": side, "W": side}
        build = functools.partial(_sam_problem, shape, dtype, quick)
        name = f"fuse/sam-{size}-1024" + "-quick" * quick
        long = size == "vit-h" and device == "cpu"  # a minute a call
        found.append(Case("fuse", name, shape, dtype, build, SOURCES, modes=("fwd",), by_name=long))
    return found


def _grounding_dino_problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    from fastcss.models.grounding_dino import GroundingDinoEncoder, phrases_to_ids

    model = GroundingDinoEncoder.random(shape["model"]).to(device, dtype)
    pixels = _steps.normal(shape["B"], 3, shape["H"], shape["W"], dtype=dtype, device=device)
    text = phrases_to_ids()[0].to(device).expand(shape["B"], -1)

    def outputs(model: Callable, pixels: Tensor) -> Sequence[Tensor]:
        output = model(pixel_values=pixels, input_ids=text)
        return output.last_hidden_state_vision, output.last_hidden_state_text

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        outputs(model, pixels)
    exported = _grounding_dino.onnx_model(model, pixels, text)
    return _problem(model, outputs, pixels, exported, counter.get_total_flops(), quick, constants=[text])


def _sam_problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    model = random_sam(shape["model"]).to(device, dtype)
    pixels = _steps.normal(shape["B"], 3, shape["H"], shape["W"], dtype=dtype, device=device)

    def outputs(model: Callable, pixels: Tensor) -> Sequence[Tensor]:
        return (model(pixels).last_hidden_state,)

    exported = _onnx.OnnxModel(_Embedding(random_sam(shape["model"], like=model)).eval(), (pixels,))
    return _problem(model, outputs, pixels, exported, shape["B"] * sam_flops(model.config), quick)


def _problem(
    model: nn.Module,
    outputs: Callable[[Callable, Tensor], Sequence[Tensor]],
    pixels: Tensor,
    exported: _onnx.OnnxModel,
    flops: float,
    quick: bool,
    constants: Sequence[Tensor] = (),
) -> Problem:
    """Make the problem of ``outputs(model, pixels)``; ``constants`` are the other tensors that every call has."""
    tensors = [*model.parameters(), *model.buffers()]

    def step(model: Callable, pixels: Tensor = pixels) -> Step:
        return torch.no_grad()(lambda: outputs(model, pixels))

    def fused(fuse: Callable[[nn.Module], object]) -> Step:
        copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        fuse(copied)
        return step(copied)

    providers: dict[str, Callable[[], Step]] = {"fastcss": lambda: fused(fastcss.fuse), "eager": lambda: step(model)}
    if pixels.device.type == "cpu":  # the linear layers of a GPU are torch's in any case
        providers["attention only"] = lambda: fused(functools.partial(fuse_modules, linears=False))
        providers |= {engine.NAME: functools.partial(engine.loaded, exported) for engine in (_onnx_runtime, _openvino)}
    else:
        providers["triton"] = lambda: _steps.on("triton", fused(fastcss.fuse))
        if not quick:  # a CPU's compiles for a minute, and is slower than eager
            providers["compiled"] = lambda: step(torch.compile(model))

    def expected():
        return step(copy.deepcopy(model).double(), pixels.double())()

    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    capture = _steps.capture_with([*constants, *tensors])
    return Problem(providers, expected, TOLERANCE[pixels.dtype], flops, weights, capture=capture)


class _Embedding(nn.Module):
    """Returns SAM's embedding as a tensor."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels).last_hidden_state


def random_sam(size: str, like: nn.Module | None = None) -> nn.Module:
    """Build SAM's image encoder with attention on SDPA; or with the weights of another one, ``like``, and with eager
    attention, of whose export the engines are no slower.

    By transformers' own initialisation all of it but the norms would be 0.
    """
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    from fastcss.models.sam import VITS

    width, layers, heads = VITS.get(size, TINY)
    whole = [layers * quarter // 4 - 1 for quarter in (1, 2, 3, 4)] if size in VITS else [1]
    small = {} if size in VITS else {"image_size": 160, "window_size": 4, "output_channels": 32}
    config = SamVisionConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, global_attn_indexes=whole, **small
    )
    config._attn_implementation = "sdpa" if like is None else "eager"
    model = SamVisionEncoder(config).eval().requires_grad_(False)
    if like is not None:
        model.load_state_dict(like.state_dict(), assign=True)
        return model
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.2)  # which makes the bias about as large as the products of q and k
    return model


def sam_flops(config) -> int:
    """Count the FLOPs of SAM's encoder for a picture, from transformers' ``SamVisionConfig``.

    Tokens that fill up windows count as keys and values, which are the same constant for all of them. As queries they
    are thrown away, so neither that nor their projections is counted: of ViT-B's 972 GFLOP as transformers does it
    (5,960 of ViT-H's), 938 (5,642) remain.
    """
    side, width, out = config.image_size // config.patch_size, config.hidden_size, config.output_channels
    tokens = side * side
    total = 2 * tokens * width * config.num_channels * config.patch_size**2
    for layer in range(config.num_hidden_layers):
        span = side if layer in config.global_attn_indexes else config.window_size
        total += 2 * tokens * width * (4 * width + 2 * config.mlp_dim)
        total += 4 * tokens * span**2 * width + 4 * tokens * span * width  # with the products of q and the tables
    return total + 2 * tokens * out * (width + 9 * out)
