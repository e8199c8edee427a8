"""Cases of ``fastcss.nn.ClassAwareAffinity``: the whole head on 64×64 pixels, and the bare head that it is added to.

Mode "bwd" is a training step of the head: forward, its losses, then the gradients of the features and of every
parameter.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastcss.nn import ClassAwareAffinity

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 has some twenty layers that add up as many as 4096 rounded
# products; bfloat16 has 8 bits in each of these layers.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-1}
SOURCES = ("fastcss/nn/caa.py", "fastcss/nn/center_attention.py", "fastcss/_ops/*.py", "fastcss/composed/*.py")


def cases(device: str, quick: bool) -> list[Case]:
    """List the head, the head with OCR's bottleneck, and "base", the bare segmentation layer that CAA is added to.

    CUDA runs inference in bfloat16 and training in float32: the gradients of a head that was never trained are nothing
    but rounding in bfloat16, in every implementation, so that none could be verified.
    """
    if device == "cuda":
        kinds = [(torch.bfloat16, "", ("fwd",)), (torch.float32, "-fp32", ("bwd",))]
    else:
        kinds = [(torch.float32, "", ("fwd", "bwd"))]
    shape = {"B": 1, "D": 512, "C": 150, "h": 64, "w": 64}
    if quick:
        shape = {"B": 1, "D": 64, "C": 20, "h": 12, "w": 12}
    found = []
    for dtype, ending, modes in kinds:
        for what in ("head", "ocr-head", "base"):
            name = f"caa/{what}-64x64{ending}" + "-quick" * quick
            build = functools.partial(_problem, what, shape, dtype)
            found.append(Case("caa", name, shape, dtype, build, SOURCES, modes))
    return found


def _problem(what: str, shape: dict, dtype: torch.dtype, device: str, mode: str) -> Problem:
    size = (shape["B"], shape["D"], shape["h"], shape["w"])
    features = _steps.normal(*size, dtype=dtype, device=device)
    labels = torch.randint(shape["C"], (shape["B"], 8 * shape["h"], 8 * shape["w"]), device=device)
    head = ClassAwareAffinity(shape["D"], shape["C"], ocr_bottleneck=what == "ocr-head").train(mode == "bwd")
    for norm in (module for module in head.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.constant_(norm.bias, 4)  # or rounding decides at some pixels whether a ReLU passes their gradient
    literal = _variant(head, "reference", dtype, device)

    if what == "base":
        base = Base(literal)
        providers = {"fastcss": lambda: _step(base, features, labels, mode)}
        wide, model = Base(_variant(head, "reference", torch.float64, device)), base
    else:
        names = {"fastcss": "auto", "literal": "reference", "composed": "composed"}
        names |= {"triton": "triton"} if device == "cuda" else {}
        providers: dict[str, Callable[[], Step]] = {
            name: lambda impl=impl: _step(_variant(head, impl, dtype, device), features, labels, mode)
            for name, impl in names.items()
        }
        wide, model = _variant(head, "reference", torch.float64, device), literal
    return Problem(
        providers,
        lambda: _step(wide, features.double(), labels, mode)(),
        TOLERANCE[dtype],
        *_work(model, features, mode),
    )


def _variant(head: ClassAwareAffinity, impl: str, dtype: torch.dtype, device: str) -> ClassAwareAffinity:
    """Copy the head, with the same parameters, to run on ``impl``."""
    variant = copy.deepcopy(head).to(device, dtype)
    variant.impl = impl
    return variant


class Base(nn.Module):
    """Stands for a model without CAA: it has the segmentation layer and its loss, and nothing else."""

    def __init__(self, head: ClassAwareAffinity) -> None:
        super().__init__()
        self.segmentation = head.segmentation

    def forward(self, features: Tensor) -> tuple[Tensor]:
        return (self.segmentation(features),)

    def loss(self, output: tuple[Tensor], labels: Tensor) -> tuple[Tensor]:
        logits = output[0].to(torch.promote_types(output[0].dtype, torch.float32))
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
        return (F.cross_entropy(logits, labels),)


def _step(model: nn.Module, features: Tensor, labels: Tensor, mode: str) -> Step:
    """Make a step: inference returns the logits, training the total loss and the features' and weights' gradients."""
    if mode == "fwd":
        return torch.no_grad()(lambda: (model(features)[0],))
    features = features.clone().requires_grad_()
    leaves = [features, *model.parameters()]

    def step():
        total = model.loss(model(features), labels)[0]
        gradients = torch.autograd.grad(total, leaves)
        # A bias that the next norm takes out again has a gradient of 0: what is computed for it is only rounding.
        return total.detach(), *(gradient for gradient in gradients if gradient.dim() > 1)

    return step


def _work(model: nn.Module, features: Tensor, mode: str) -> tuple[float, float]:
    """Count FLOPs, and bytes of features and parameters.

    The map is multiplied with the features twice, and counts once, since one product is enough. A training step takes
    three times the products of inference, and the loss of the map.
    """
    batch, width, height, columns = features.shape
    pixels = height * columns
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(features)
    flops = counter.get_total_flops()
    held = (features.numel() + sum(p.numel() for p in model.parameters())) * features.itemsize
    head = isinstance(model, ClassAwareAffinity)
    if head:
        flops -= 2 * batch * pixels**2 * width
    if mode == "fwd":
        return flops, held
    loss = 8 * batch * pixels**2 * model.query.out_channels if head else 0
    return 3 * flops + loss, 2 * held
