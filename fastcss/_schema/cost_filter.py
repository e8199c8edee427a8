import math

import torch
from torch import Tensor

from ._library import raw_op

PANEL_ROWS = 12  # one step of the CPU's matrix products reads a panel of so many rows of packed text


# image [B, H, W, D], text [1 or B, T, P, D]; scale float32 [1 or B, T, P] is 1 / max(‖text‖, 1e-12), and it and panels
# are from pack_text, or empty. k ≤ T. cost [B, k, P, H, W] in the dtype of image, index int64 [B, k],
# best class first, ties by lower class; score [B, k] = max of cost over P, H, W.
@raw_op(
    "(Tensor image, Tensor text, Tensor scale, Tensor panels, SymInt k) -> (Tensor cost, Tensor index, Tensor score)",
    # All classes' costs, and the kept ones' once more.
    flops=lambda image, text, scale, panels, k: 2 * math.prod(image) * text[2] * (text[1] + k),
)
def cost_filter(image, text, scale, panels, k) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width, _ = image.shape
    cost = image.new_empty(batch, k, text.shape[2], height, width)
    return cost, image.new_empty((batch, k), dtype=torch.int64), image.new_empty(batch, k)


# dtext is of the shape of text: summed over the images where they share it.
@raw_op(
    "(Tensor dcost, Tensor image, Tensor text, Tensor cost, Tensor index) -> (Tensor dimage, Tensor dtext)",
    flops=lambda dcost, image, text, cost, *_: 4 * math.prod(cost) * image[3],
)
def cost_filter_backward(dcost, image, text, cost, index) -> tuple[Tensor, Tensor]:
    return image.new_empty(image.shape), text.new_empty(text.shape)


# scale float32 [B, T, P], and for the CPU's kernel the text as its matrix products read it, float32 and with T · P
# rounded up to whole panels; empty unless want_panels.
@raw_op("(Tensor text, bool want_panels) -> (Tensor scale, Tensor panels)", flops=None)
def pack_text(text, want_panels) -> tuple[Tensor, Tensor]:
    batch, classes, prompts, width = text.shape
    rows = (classes * prompts + PANEL_ROWS - 1) // PANEL_ROWS * PANEL_ROWS
    panels = (batch, rows, width) if want_panels else (0,)
    return text.new_empty((batch, classes, prompts), dtype=torch.float32), text.new_empty(panels, dtype=torch.float32)


# score [B, T]; the k ≤ T best of each row in order, NaN above all, ties by lower index. index int64.
@raw_op("(Tensor score, SymInt k) -> (Tensor score, Tensor index)", flops=None)
def top_classes(score, k) -> tuple[Tensor, Tensor]:
    return score.new_empty(score.shape[0], k), score.new_empty((score.shape[0], k), dtype=torch.int64)
