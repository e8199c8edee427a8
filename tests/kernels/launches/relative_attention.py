"""The kernels of relative attention compile for three GPU generations at the sizes of SAM, without spilling."""

from __future__ import annotations

from typing import NamedTuple


class Relative(NamedTuple):
    """A call and its backward on the map of 64² of a picture of 1024²."""

    window: int = 0
    dtype: str = "bfloat16"
    width: int = 64
    side: int = 64
    packed: bool = True  # q, k and v from one linear layer

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape):
            return torch.empty(shape, dtype=getattr(torch, self.dtype), device="meta")

        kernels.register()
        if self.packed:
            q, k, v = empty(1, self.side, self.side, 3, 12, self.width).unbind(3)
        else:
            q, k, v = (empty(1, self.side, self.side, 12, self.width) for _ in range(3))
        tables = (empty(2 * (self.window or self.side) - 1, self.width) for _ in range(2))
        pads = (empty(12, self.width).expand(1, -1, -1) for _ in range(2))
        arguments = q, k, v, *tables, *pads
        out, stats = kernels.relative_attention.relative_attention(*arguments, self.window, self.width**-0.5)
        kernels.relative_attention_backward.relative_attention_backward(
            out, *arguments, out, stats, self.window, self.width**-0.5, True
        )


# Each case compiles the kernels that it launches; one that an earlier case launched in the same way is not listed
# again.
CASES = (
    Relative(),
    Relative(window=14),
    Relative(width=80),
    Relative(window=14, width=80),
    Relative(dtype="float32"),
    Relative(window=14, dtype="float32", width=80),
)
HOPPER = (
    Relative(dtype="float16"),
    Relative(side=96),
    Relative(side=40, packed=False),
    Relative(window=8, width=48),  # nothing to fill up
)
KERNELS = {
    "relative_bias_kernel", "relative_attention_kernel", "query_gradient_kernel", "key_gradient_kernel",
    "query_bias_gradient_kernel", "table_gradient_kernel", "sum_parts_kernel",
}  # fmt: skip
