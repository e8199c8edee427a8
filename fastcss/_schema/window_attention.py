import math

from torch import Tensor

from ._library import raw_op


# q, k, v [B, H, W, heads, D], bias [heads, window², window²], pad_key, pad_value [B, heads, D]: key and value of the
# tokens that fill the last windows up, below and to the right. → [B, H, W, heads · D].
@raw_op(
    "(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor pad_key, Tensor pad_value, int window, int shift, "
    "float scale) -> Tensor",
    flops=lambda q, k, v, bias, pad_key, pad_value, window, *_: 4 * _padded(q, window) * window**2,
)
def window_attention(q, k, v, bias, pad_key, pad_value, window, shift, scale) -> Tensor:
    batch, height, width, heads, channels = q.shape
    return q.new_empty(batch, height, width, heads * channels)


# dbias is empty unless need_bias.
@raw_op(
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor pad_key, Tensor pad_value, int window, int shift, "
    "float scale, bool need_bias) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dpad_key, Tensor dpad_value)",
    flops=lambda dout, q, k, v, bias, pad_key, pad_value, window, *_: 10 * _padded(q, window) * window**2,
)
def window_attention_backward(
    dout, q, k, v, bias, pad_key, pad_value, window, shift, scale, need_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape if need_bias else (0,))
    return *(t.new_empty(t.shape) for t in (q, k, v)), dbias, *(t.new_empty(t.shape) for t in (pad_key, pad_value))


def _padded(q, window: int) -> int:
    """Elements of ``q`` with its padding up to whole windows."""
    batch, height, width, *channels = q
    return batch * math.prod(channels) * math.prod(-(-size // window) * window for size in (height, width))
