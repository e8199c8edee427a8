from torch import Tensor

from ._library import define

# q, k, v [B, H, W, heads, D], bias [heads, window², window²], pad_key, pad_value [B, heads, D]: key and value of the
# tokens that fill the last windows up, below and to the right. → [B, H, W, heads · D].
_WINDOW_ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor pad_key, Tensor pad_value, int window, int shift, "
    "float scale) -> Tensor"
)


def _window_attention_fake(q, k, v, bias, pad_key, pad_value, window, shift, scale) -> Tensor:
    batch, height, width, heads, channels = q.shape
    return q.new_empty(batch, height, width, heads * channels)


define("window_attention", _WINDOW_ATTENTION, _window_attention_fake)

# dbias is empty unless need_bias.
_WINDOW_ATTENTION_BACKWARD = (
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor pad_key, Tensor pad_value, int window, int shift, "
    "float scale, bool need_bias) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dpad_key, Tensor dpad_value)"
)


def _window_attention_backward_fake(
    dout, q, k, v, bias, pad_key, pad_value, window, shift, scale, need_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape if need_bias else (0,))
    return *(t.new_empty(t.shape) for t in (q, k, v)), dbias, *(t.new_empty(t.shape) for t in (pad_key, pad_value))


define("window_attention_backward", _WINDOW_ATTENTION_BACKWARD, _window_attention_backward_fake)
