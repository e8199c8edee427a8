import math

import torch
from torch import Tensor

from ._library import raw_op


# q, k, v [B, H, W, heads, D], rel_h [2 Sh − 1, D], rel_w [2 Sw − 1, D], pad_key, pad_value [B, heads, D]: key and value
# of the tokens that fill the last windows up, below and to the right. window 0 means one window, the map: Sh = H,
# Sw = W, nothing to fill up. → out [B, H, W, heads · D] and, for the backward pass, stats [B, heads, H, W, 2] in
# float32: of each query the largest score and the logarithm of Σ e^(score - largest). One number for both would lose
# what a large score leaves of the logarithm.
@raw_op(
    "(Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, Tensor pad_key, Tensor pad_value, int window, "
    "float scale) -> (Tensor out, Tensor stats)",
    flops=lambda q, k, v, rel_h, rel_w, pad_key, pad_value, window, *_: _flops(q, window, 4, 2),
)
def relative_attention(q, k, v, rel_h, rel_w, pad_key, pad_value, window, scale) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, channels = q.shape
    stats = q.new_empty((batch, heads, height, width, 2), dtype=torch.float32)
    return q.new_empty(batch, height, width, heads * channels), stats


# drel_h and drel_w are empty unless need_tables.
@raw_op(
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, Tensor pad_key, Tensor pad_value, "
    "Tensor out, Tensor stats, int window, float scale, bool need_tables) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor drel_h, Tensor drel_w, Tensor dpad_key, Tensor dpad_value)",
    flops=lambda dout, q, k, v, rel_h, rel_w, pad_key, pad_value, out, stats, window, scale, need_tables: _flops(
        q, window, 10, 6 if need_tables else 4
    ),
)
def relative_attention_backward(
    dout, q, k, v, rel_h, rel_w, pad_key, pad_value, out, stats, window, scale, need_tables
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tables = (table.new_empty(table.shape if need_tables else (0,)) for table in (rel_h, rel_w))
    return *(t.new_empty(t.shape) for t in (q, k, v)), *tables, *(t.new_empty(t.shape) for t in (pad_key, pad_value))


def _flops(q, window: int, of_scores: int, of_bias: int) -> int:
    """Count so many for each channel of a query: with each key, and with each row and column of keys."""
    height, width = (window, window) if window else q[1:3]
    return math.prod(q) * (of_scores * height * width + of_bias * (height + width))
