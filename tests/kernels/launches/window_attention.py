"""The kernels of window attention compile for three GPU generations at the sizes of Swin, and without spilling."""

from __future__ import annotations

from typing import NamedTuple


class Windows(NamedTuple):
    """A call and its backward; the map is that of a stage of Swin at 800 × 1066."""

    stage: int = 0
    dtype: str = "bfloat16"
    window: int = 7
    shift: int = 3
    width: int = 32
    need_bias: bool = True
    packed: bool = False  # q, k and v from one linear layer

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape):
            return torch.empty(shape, dtype=getattr(torch, self.dtype), device="meta")

        kernels.register()
        height, width, heads = -(-200 // 2**self.stage), -(-267 // 2**self.stage), 3 * 2**self.stage
        if self.packed:
            q, k, v = empty(2, height, width, 3, heads, self.width).unbind(3)
        else:
            q, k, v = (empty(2, height, width, heads, self.width) for _ in range(3))
        bias = empty(heads, self.window**2, self.window**2)
        pads = (empty(heads, self.width).expand(2, -1, -1) for _ in range(2))
        arguments = q, k, v, bias, *pads, self.window, self.shift, self.width**-0.5
        dout = kernels.window_attention.window_attention(*arguments)
        kernels.window_attention_backward.window_attention_backward(dout, *arguments, self.need_bias)


# Each case compiles the kernels that it launches; one that an earlier case launched in the same way is not listed
# again.
CASES = (
    Windows(),
    Windows(need_bias=False),
    Windows(window=12, shift=6),
    Windows(dtype="float32"),
    Windows(dtype="float32", window=12, shift=6),
)
HOPPER = (
    *(Windows(stage, shift=shift) for stage in range(4) for shift in (0, 3)),
    Windows(packed=True),
    Windows(dtype="float16"),
    Windows(window=8, shift=4),
    Windows(window=8, shift=4, need_bias=False),
    Windows(window=5, shift=2, width=20),
)
KERNELS = {
    "window_attention_kernel", "window_gradients_kernel", "sum_parts_kernel",
    "query_gradients_kernel", "key_gradients_kernel", "bias_gradients_kernel",
}  # fmt: skip
