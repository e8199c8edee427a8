"""The multi_lora kernels compile for three GPU generations with the tiles the host code picks, and without spilling."""

from __future__ import annotations

from typing import NamedTuple

SLOTS = 6


class MultiLora(NamedTuple):
    """A call of multi_lora with K = N = width."""

    rows: int
    width: int
    mode: str
    backward: bool = False
    rank: int = 32
    dtype: str = "bfloat16"

    def call(self) -> None:
        import torch

        from fastcss.kernels.multi_lora import multi_lora
        from fastcss.kernels.multi_lora_backward import multi_lora_backward

        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        rows, width, total = self.rows, self.width, SLOTS * self.rank
        x = empty(rows, width) if self.mode == "shared" else empty(SLOTS, rows, width)
        weight, a, b = empty(width, width), empty(total, width), empty(total, width)
        offsets, scales = empty(SLOTS + 1, dtype="int32"), empty(SLOTS, dtype="float32")
        index = empty(SLOTS, dtype="int64") if self.mode == "routed" else None
        if self.backward:
            h = empty(*((rows, total) if index is None else (SLOTS, rows, self.rank)), dtype="float32")
            dy = empty(SLOTS, rows, width)
            multi_lora_backward(dy, x, weight, a, b, offsets, scales, index, h, self.rank, True, True)
        else:
            multi_lora(x, weight, empty(width), a, b, offsets, scales, index, self.rank, False)


# Each case compiles the kernels that it launches; one that an earlier case launched in the same way is not listed
# again. The shapes are those that the op has targets for, and then large ranks and float32.
CASES = (
    MultiLora(4096, 256, "shared"),
    MultiLora(4096, 1024, "shared"),
    MultiLora(17821, 256, "shared"),
    MultiLora(17821, 1024, "shared"),
    MultiLora(4096, 256, "diverged"),
    MultiLora(4096, 1024, "diverged"),
    MultiLora(4096, 4096, "diverged"),
    MultiLora(1, 1024, "routed"),
    MultiLora(32, 1024, "diverged"),
    MultiLora(64, 1024, "shared"),
    MultiLora(4096, 1024, "shared", backward=True),
    MultiLora(4096, 1024, "diverged", backward=True),
    MultiLora(64, 1024, "routed", backward=True),
    MultiLora(4096, 1024, "shared", rank=200),
    MultiLora(64, 1024, "routed", rank=128),
    MultiLora(1024, 768, "shared", backward=True, dtype="float32"),
    MultiLora(1024, 768, "diverged", dtype="float32"),
    MultiLora(64, 768, "diverged", dtype="float32"),
)
KERNELS = {"shrink_kernel", "expand_kernel", "fused_kernel", "gradient_kernel"}
