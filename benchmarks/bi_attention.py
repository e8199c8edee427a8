"""Cases of ``bi_attention``: all image tokens of a picture and a short or a long text, and other ways to relate them.

Mode "bwd" is a training step's share: forward, then the gradients of queries, keys and both values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcss.ops import bi_attention

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 takes means of 17,821 rounded terms. bfloat16 has 8 bits
# for the logits, which are up to 10 below the largest, and for the attention where it is in memory. The gradients of
# the model's own code are worse: its maxima have gradients too. They would be 0 but for the rounding of all N · L
# logits, and that falls on a few of them.
TOLERANCE = {
    "fwd": {torch.float32: 2e-5, torch.bfloat16: 5e-2},
    "bwd": {torch.float32: 3e-4, torch.bfloat16: 2.5e-1},
}
SOURCES = ("fastcss/_ops/bi_attention.py", "fastcss/composed/bi_attention.py")

Forward = Callable[..., tuple[Tensor, Tensor]]


def cases(device: str, quick: bool) -> list[Case]:
    """List the points of the specification: Grounding DINO's fusion on a picture of 800 × 1066 pixels, with the text
    of a few phrases and with the longest text that the model takes.

    Some of the text is padding and none of the picture, as in the model's batch of one picture; the model masks both.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = []
    for length, padding in ((20, 3), (256, 40)):
        name, shape = f"bi_attention/n17821-l{length}", {"B": 1, "N": 17821, "L": length, "padding": padding}
        shape |= {"heads": 4, "D": 256}
        if quick:
            name, shape = f"{name}-quick", shape | {"N": 331, "D": 32}
        build = functools.partial(_problem, shape, dtype, quick)
        found.append(Case("bi_attention", name, shape, dtype, build, SOURCES))
    return found


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    batch, pixels, length, heads, width = (shape[name] for name in ("B", "N", "L", "heads", "D"))
    image, text = (batch, pixels, heads, width), (batch, length, heads, width)
    tensors = [_steps.normal(*size, dtype=dtype, device=device) for size in (image, text, image, text)]
    gradients = [_steps.normal(*size[:2], heads * width, dtype=dtype, device=device) for size in (image, text)]
    text_mask = (torch.arange(length, device=device) >= length - shape["padding"]).expand(batch, -1)
    masks = text_mask, torch.zeros(batch, pixels, dtype=torch.bool, device=device)

    def step(forward: Forward) -> Step:
        return _steps.step_of(lambda *leaves: forward(*leaves, *masks), tensors, gradients, mode)

    def with_(impl: str) -> Forward:
        return functools.partial(bi_attention, impl=impl)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(bi_attention),
        "eager": lambda: step(_eager),
        "sdpa": lambda: step(_sdpa),
    }
    if not quick:
        providers["compiled"] = lambda: step(torch.compile(_eager))
    if device == "cuda":
        providers["composed"] = lambda: step(with_("composed"))
        providers["triton"] = lambda: step(with_("triton"))

    def expected():
        exact = with_("reference")
        return _steps.expected(lambda *leaves: exact(*leaves, *masks), tensors, gradients, mode)

    return Problem(providers, expected, TOLERANCE[mode][dtype], *work(shape, dtype.itemsize, mode))


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count FLOPs, and bytes in and out of memory.

    The forward pass has the logits and one product for each side. The backward pass has two products for each of
    these; the logits that it may compute again do not count.
    """
    batch, pixels, length, heads, width = (shape[name] for name in ("B", "N", "L", "heads", "D"))
    flops = 6 * batch * pixels * length * heads * width
    side = batch * (pixels + length) * heads * width  # q and k, both values, or both outputs
    if mode == "fwd":
        return flops, 3 * side * itemsize
    return 3 * flops, (3 * 2 + 2) * side * itemsize


def _eager(
    q: Tensor, k: Tensor, v_image: Tensor, v_text: Tensor, text_mask: Tensor, image_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Follow transformers' GroundingDinoBiMultiHeadAttention between its linear layers, line by line."""
    batch, pixels, heads, width = q.shape

    def reshape(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().view(batch * heads, -1, width)

    q, k, v_image, v_text = (reshape(x) for x in (q * width**-0.5, k, v_image, v_text))
    logits = torch.bmm(q, k.transpose(1, 2))  # [B · heads, N, L]
    logits = logits - logits.max()
    logits = torch.clamp(logits, min=-50000, max=50000)
    transposed = logits.transpose(1, 2)
    of_text = transposed - torch.max(transposed, dim=-1, keepdim=True)[0]
    of_text = torch.clamp(of_text, min=-50000, max=50000)
    image_mask = image_mask[:, None, None, :].repeat(1, heads, 1, 1).flatten(0, 1)
    of_text.masked_fill_(image_mask, float("-inf"))
    of_text = of_text.softmax(dim=-1)
    text_mask = text_mask[:, None, None, :].repeat(1, heads, 1, 1).flatten(0, 1)
    logits.masked_fill_(text_mask, float("-inf"))
    of_image = logits.softmax(dim=-1)
    image, text = torch.bmm(of_image, v_text), torch.bmm(of_text, v_image)
    image = image.view(batch, heads, pixels, width).transpose(1, 2).reshape(batch, pixels, heads * width)
    return image, text.view(batch, heads, -1, width).transpose(1, 2).reshape(batch, -1, heads * width)


def _sdpa(
    q: Tensor, k: Tensor, v_image: Tensor, v_text: Tensor, text_mask: Tensor, image_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend from each side separately: logits are computed twice, and not clamped, as none reaches the clamps here."""
    q, k, v_image, v_text = (x.transpose(1, 2) for x in (q, k, v_image, v_text))
    image = F.scaled_dot_product_attention(q, k, v_text, attn_mask=~text_mask[:, None, None])
    text = F.scaled_dot_product_attention(k, q, v_image, attn_mask=~image_mask[:, None, None])
    return image.transpose(1, 2).flatten(2), text.transpose(1, 2).flatten(2)
