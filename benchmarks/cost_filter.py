"""Cases of ``cost_filter`` and of ``top_classes``, the selection in it, and other ways to do them.

Mode "bwd" is a training step's share: forward, then the gradients of image and text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcss.ops import cost_filter, pack_text, top_classes

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 has products of 512 rounded terms, and sums of 576 in the
# gradients. bfloat16 has 8 bits, in the normalised rows and in the cost.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SOURCES = ("fastcss/_ops/cost_filter.py", "fastcss/composed/cost_filter.py", "fastcss/_cosine.py")
#: The chunked form tries this many elements of the cost map at a time.
CHUNKS = (1 << 17, 1 << 19, 1 << 21)

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def cases(device: str, quick: bool) -> list[Case]:
    """The points of the specification."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = 5 if device == "cuda" else 1
    points = [("t847-p1", 5, 847, 1), ("t150-p80", batch, 150, 80)]
    return [_case(*point, dtype, quick) for point in points] + [_top_case(k, quick) for k in (32, 512)]


def _case(what: str, batch: int, classes: int, prompts: int, dtype: torch.dtype, quick: bool) -> Case:
    name, shape = f"cost_filter/{what}", {"B": batch, "T": classes, "P": prompts, "H": 24, "W": 24, "D": 512, "k": 32}
    if quick:
        name = f"{name}-quick"
        shape = {"B": batch, "T": 20, "P": min(prompts, 3), "H": 6, "W": 5, "D": 128, "k": 4}
    return Case("cost_filter", name, shape, dtype, functools.partial(_problem, shape, dtype, quick), SOURCES)


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    text = _steps.normal(*(shape[n] for n in "TPD"), dtype=torch.float32, device=device)
    image, text = _image(shape, text).to(dtype), text.to(dtype)
    cost_size = [shape[n] for n in "BkPHW"]
    gradients = (_steps.normal(*cost_size, dtype=dtype, device=device),)
    k = shape["k"]

    def step(forward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Step:
        return _steps.step_of(functools.partial(forward, k=k), (image, text), gradients, mode)

    def chunked(elements: int) -> Step:
        return step(functools.partial(_chunked, elements=elements))

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(cost_filter),
        "literal": lambda: step(_literal),
        "amax": lambda: step(_amax),
        "chunked": lambda: _steps.fastest(chunked, CHUNKS),
    }
    if mode == "fwd":
        providers["fastcss-packed"] = lambda: _packed(image, text, k)
    if not quick:
        providers["compiled"] = lambda: step(torch.compile(_literal))
        providers["amax-compiled"] = lambda: step(torch.compile(_amax))
    if device == "cuda":
        for impl in ("composed", "triton"):
            providers[impl] = lambda impl=impl: step(functools.partial(cost_filter, impl=impl))

    def expected():
        exact = functools.partial(cost_filter, k=k, impl="reference")
        return _steps.expected(exact, (image, text), gradients, mode)

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode))


def _image(shape: dict, text: Tensor) -> Tensor:
    """Draw noise in which k classes appear, at one pixel each per image, with costs far enough apart for bfloat16.

    It is stored as a backbone gives it, [B, D, H, W]. The costs that noise has by chance stay below the least of these.
    """
    batch, height, width, d, k = (shape[n] for n in "BHWDk")
    pixels = torch.randn(batch, height * width, d, device=text.device)
    cosine = torch.linspace(0.95, 7 * d**-0.5, k, device=text.device)[:, None]
    for image in pixels:
        classes, places = torch.randperm(len(text))[:k], torch.randperm(len(image))[:k]
        shown = F.normalize(text[classes, torch.randint(text.shape[1], (k,))], dim=1)
        rest = image[places]
        rest = F.normalize(rest - (rest * shown).sum(1, keepdim=True) * shown, dim=1)
        image[places] = (cosine * shown + (1 - cosine**2).sqrt() * rest) * d**0.5
    return pixels.mT.contiguous().unflatten(2, (height, width)).permute(0, 2, 3, 1)


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count FLOPs, those of all maps and once more of those that are kept, and bytes in and out of memory."""
    batch, t, p, d, k = (shape[n] for n in "BTPDk")
    pixels = shape["H"] * shape["W"]
    one_map = 2 * batch * p * pixels * d
    flops, moved = one_map * (t + k), batch * pixels * d + t * p * d + batch * k * p * pixels
    return (flops, moved * itemsize) if mode == "fwd" else (flops + 2 * one_map * k, 2 * moved * itemsize)


def _packed(image: Tensor, text: Tensor, k: int) -> Step:
    """Pack the text once, as a model does whose text does not change."""
    packed = pack_text(text)
    return torch.no_grad()(lambda: cost_filter(image, packed, k))


def _literal(image: Tensor, text: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follow CAT-Seg's aggregator: float32, the text repeated for each image, the whole cost map in memory."""
    given = image.dtype
    image, text = image.permute(0, 3, 1, 2).float(), text.float().repeat(len(image), 1, 1, 1)
    cost = torch.einsum("bchw,btpc->bpthw", F.normalize(image, dim=1), F.normalize(text, dim=-1))
    best = cost.detach().permute(0, 2, 1, 3, 4).flatten(-3).max(dim=-1)[0]
    score, index = best.topk(k, dim=-1)
    text = F.normalize(text, dim=-1)
    text = torch.gather(text, 1, index[..., None, None].expand(-1, -1, text.size(-2), text.size(-1)))
    cost = torch.einsum("bchw,btpc->bpthw", F.normalize(image, dim=1), text)
    return cost.transpose(1, 2).to(given), index, score.to(given)


def _amax(image: Tensor, text: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take one product in the inputs' dtype and its largest values, without a second normalisation or permuted copy."""
    (batch, height, width, _), prompts = image.shape, text.shape[1]
    pixels, text = F.normalize(image, dim=-1).flatten(1, 2), F.normalize(text, dim=-1)
    with torch.no_grad():
        cost = torch.matmul(text.flatten(0, 1), pixels.mT)  # [B, T·P, HW]
        score, index = cost.unflatten(1, (-1, prompts)).amax(dim=(2, 3)).topk(k, dim=1)
    kept = torch.bmm(text[index].flatten(1, 2), pixels.mT)
    return kept.view(batch, k, prompts, height, width), index, score


def _chunked(image: Tensor, text: Tensor, k: int, elements: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do as ``_amax`` does, with the cost map of a few classes at a time."""
    (batch, height, width, _), (classes, prompts, _) = image.shape, text.shape
    pixels, text = F.normalize(image, dim=-1).flatten(1, 2), F.normalize(text, dim=-1)
    with torch.no_grad():
        size = max(1, elements // (batch * prompts * height * width))
        best = image.new_empty(batch, classes)
        for part, target in zip(text.split(size), best.split(size, dim=1), strict=True):
            cost = torch.matmul(part.flatten(0, 1), pixels.mT).unflatten(1, (-1, prompts))
            torch.amax(cost, dim=(2, 3), out=target)
        score, index = best.topk(k, dim=1)
    kept = torch.bmm(text[index].flatten(1, 2), pixels.mT)
    return kept.view(batch, k, prompts, height, width), index, score


def _top_case(k: int, quick: bool) -> Case:
    name, shape = f"cost_filter/topk-64x16384-k{k}", {"B": 64, "T": 16384, "k": k}
    if quick:
        name, shape = f"{name}-quick", {"B": 4, "T": 1000, "k": k // 2}
    build = functools.partial(_top_problem, shape)
    return Case("cost_filter", name, shape, torch.float32, build, SOURCES, modes=("fwd",))


def _top_problem(shape: dict, device: str, mode: str) -> Problem:
    batch, classes, k = (shape[n] for n in "BTk")
    # The values are normal and all different, as torch.topk leaves open how it orders ties.
    place = torch.rand(batch, classes, device=device).argsort(dim=1)
    score = torch.special.ndtri((place.double() + 0.5) / classes).float()

    def step(forward: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Step:
        return lambda: forward(score, k)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(top_classes),
        "topk": lambda: step(lambda x, k: x.topk(k, dim=1)),
        "sort": lambda: step(lambda x, k: tuple(y[:, :k] for y in x.sort(dim=1, descending=True, stable=True))),
    }
    if device == "cuda":
        for impl in ("composed", "triton", "cuda"):
            providers[impl] = lambda impl=impl: step(functools.partial(top_classes, impl=impl))

    def expected():
        return top_classes(score.double(), k, impl="reference")

    return Problem(providers, expected, 0.0, 0.0, batch * (classes * 4 + k * (4 + 8)))
