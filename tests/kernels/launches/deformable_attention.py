"""The kernels of the pass itself compile for three GPU generations at the sizes they are for, without spilling."""

from __future__ import annotations

from typing import NamedTuple


class Deformable(NamedTuple):
    """A call and its backward over levels of an image of 800 × 1066, each half as large as the one before."""

    queries: int
    dtype: str = "bfloat16"
    levels: int = 4
    points: int = 4
    width: int = 32
    box: bool = False  # reference points with a width and a height
    height: int = 100  # of the first level

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        kernels.register()
        sizes = [(-(-self.height // 2**level), -(-134 // 2**level)) for level in range(self.levels)]
        shapes = [size for pair in sizes for size in pair]
        value = empty(2, sum(height * width for height, width in sizes), 8, self.width)
        reference = empty(2, self.queries, self.levels, 4 if self.box else 2, dtype="float32")
        offsets = empty(2, self.queries, 8, self.levels, self.points, 2)
        arguments = value, shapes, reference, offsets, empty(*offsets.shape[:5])
        dout = kernels.deformable_attention.deformable_attention(*arguments)
        kernels.deformable_attention_backward.deformable_attention_backward(dout, *arguments, self.box)


# Each case compiles the kernels that it launches; one that an earlier case launched in the same way is not listed
# again.
CASES = (
    Deformable(17821),
    Deformable(17821, dtype="float32"),
    Deformable(900, box=True),
    Deformable(900, dtype="float32", box=True),
)
HOPPER = (
    Deformable(17821, dtype="float16"),
    Deformable(17821, levels=3, points=8, width=64),
    Deformable(900, levels=5, points=3, width=48),  # none a power of two
    Deformable(900, levels=1, points=1, width=256),
    Deformable(17821, height=128),
)
KERNELS = {"deformable_attention_kernel", "points_gradient_kernel", "value_sums_kernel", "dvalue_kernel"}
