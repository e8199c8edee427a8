"""The kernels of bi_attention compile for three GPU generations at the sizes of the model, without spilling."""

from __future__ import annotations

from typing import NamedTuple


class BiAttention(NamedTuple):
    """A call and its backward on an image of 800 × 1066 and a text, with four heads."""

    length: int
    dtype: str = "bfloat16"
    width: int = 256
    masks: bool = True
    pixels: int = 17821

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        kernels.register()
        q, k = (empty(2, tokens, 4, self.width) for tokens in (self.pixels, self.length))
        masks = [empty(2, tokens, dtype="bool") if self.masks else None for tokens in (self.length, self.pixels)]
        inputs = q, k, q, k, *masks
        image, text, *statistics = kernels.bi_attention.bi_attention(*inputs, self.width**-0.5, 2)
        kernels.bi_attention_backward.bi_attention_backward(
            image, text, *inputs, text, *statistics, self.width**-0.5
        )  # fmt: skip


# Each case compiles the kernels that it launches; one that an earlier case launched in the same way is not listed
# again.
CASES = (
    BiAttention(20),
    BiAttention(256),
    BiAttention(20, dtype="float32"),
    BiAttention(256, dtype="float32"),
)
HOPPER = (
    BiAttention(64),
    BiAttention(256, dtype="float16"),
    BiAttention(20, masks=False),
    BiAttention(256, masks=False),
    BiAttention(195, width=48),  # none a power of two
)
KERNELS = {"attend_kernel", "combine_kernel", "delta_kernel", "gradient_kernel", "add_parts_kernel"}
