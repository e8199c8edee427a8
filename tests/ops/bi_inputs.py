"""Makes inputs of bi-directional attention: of any shape, and with logits so far apart that the model's clamp acts."""

from __future__ import annotations

import pytest
import torch
from calls import Call, normal
from torch import Tensor

from fastcss.ops import bi_attention

TENSORS = ("q", "k", "v_image", "v_text")
MASKS = ("text_mask", "image_mask")

CASES = {  # B, N, L, heads, D
    "one of everything": (1, 1, 1, 1, 1),
    "no samples": (0, 5, 3, 2, 4),
    "no image": (2, 0, 5, 2, 4),
    "no text": (2, 19, 0, 2, 4),
    "one text token": (2, 19, 1, 2, 5),
    "one image token": (2, 1, 20, 2, 5),
    "D 5": (3, 19, 5, 2, 5),
    "D 8": (2, 37, 20, 1, 8),
    "D 17": (1, 37, 20, 3, 17),
}
# Across the edges of a tiled kernel's blocks.
EACH_MASK = pytest.mark.parametrize("masks", [(), *((name,) for name in MASKS), MASKS], ids=" ".join)
LARGE = {
    "N 300": (2, 300, 20, 4, 64),
    "L 70": (1, 130, 70, 2, 33),
    "L 256": (1, 67, 256, 2, 16),
    "D 256": (1, 75, 20, 4, 256),
}


def make(batch, pixels, length, heads, width, *, masks=MASKS, dtype=torch.float32, device="cpu", seed=0) -> Call:
    sizes = {"q": pixels, "k": length, "v_image": pixels, "v_text": length}
    shapes = {name: (batch, tokens, heads, width) for name, tokens in sizes.items()}
    tensors = {n: normal(*shape, seed=seed + i, dtype=dtype) for i, (n, shape) in enumerate(shapes.items())}
    options = {name: some(batch, length if name == "text_mask" else pixels, seed) for name in masks}
    return Call(bi_attention, tensors, options).map(lambda tensor: tensor.to(device))


def some(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Draw bool [batch, tokens]: a third of the tokens are not read, never all."""
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < 1 / 3
    return mask & (torch.arange(tokens) != seed % max(1, tokens))


# --- logits further apart than the model counts ----------------------------------------------------------------------

# Below the peak by more than the model's 50,000, and by not quite as much.
BELOW, ABOVE = 256 * 240, 256 * 192 + 18 * 47

#: Tells how far text token j of sample b is from the peak at image token i.
FAR = {
    "nothing": lambda b, i, j: (i % 3 == 1) * ABOVE,
    "some entries of a row": lambda b, i, j: (i % 3 == 1) * torch.where(j % 2 == 0, BELOW, ABOVE),
    "a whole row": lambda b, i, j: (i % 3 == 1) * BELOW,
    "some entries of a column": lambda b, i, j: (j == 2) * torch.where(i % 2 == 0, BELOW, ABOVE),
    "a whole column": lambda b, i, j: (j == 2) * BELOW,
    "some of another sample": lambda b, i, j: (b == 1) * torch.where((i + j) % 2 == 0, BELOW, ABOVE),
    "all of another sample": lambda b, i, j: (b == 1) * BELOW,
    "all but one": lambda b, i, j: ~((b == 0) & (i == 4) & (j == 1)) * BELOW,
}


def make_far(case: str, *, masks=MASKS, dtype=torch.float32, device="cpu", pixels=11) -> Call:
    """Make a call in which rounding does not decide what is floored: numbers and products are exact in 16 bits, sums
    in 32.

    A head has 16 channels: two for each of the 6 text tokens make its distance, and 4 make logits of less than 1.
    """
    batch, length, heads, width = 2, 6, 2, 16
    call = make(batch, pixels, length, heads, width, masks=masks)
    sizes = (batch, pixels, length)
    at = [torch.arange(size).view([size if d == n else 1 for d in range(3)]) for n, size in enumerate(sizes)]
    far = torch.as_tensor(FAR[case](*at)).expand(sizes)[:, :, None].expand(-1, -1, heads, -1)  # [B, N, heads, L]
    coarse, fine = (far == BELOW) * 240 + (far == ABOVE) * 192, (far == ABOVE) * 47
    near = normal(batch, pixels, heads, 4, seed=7).sign()
    q = torch.cat([coarse, fine, near], dim=3) * width**0.5
    own = torch.eye(length)[:, None].expand(batch, length, heads, length)
    near = (8 * normal(batch, length, heads, 4, seed=8)).round().clamp(-3, 3) / 32
    k = torch.cat([-256 * own, -18 * own, near], dim=3)
    call = call.having(q=q, k=k)
    call = Call(call.op, {name: tensor.to(dtype) for name, tensor in call.tensors.items()}, call.options)
    return call.map(lambda tensor: tensor.to(device))


def rounded_once(q, k, v_image, v_text, *, impl, **options):
    """Run the literal code in float32 and round to the dtype of ``q``: as good as 16 bits can be."""
    tensors, dtype = (q, k, v_image, v_text), q.dtype
    if impl == "reference":
        tensors = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in tensors)
    found = bi_attention(*tensors, impl=impl, **options)
    return type(found)(*(side.to(dtype) for side in found))
