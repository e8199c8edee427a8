"""Defines raw ops: their schemas, fake kernels and FLOPs, in one library.

One op has one overload an implementation (``fastcss::multi_lora.cpu``, ``.triton``, …): the graph of a compiled model
names the kernel that runs, and an explicit ``impl=`` can never be rerouted by the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("fastcss", "DEF")
COMPILED = ("cpu", "cuda", "triton")


def raw_op(signature: str, *, flops: Callable[..., int] | None) -> Callable:
    """Define a raw op of the name of a function, which becomes its fake kernel: outputs without values.

    Args:
        signature: in torch's schema language, without the name.
        flops: what the op multiplies and adds, for ``torch.utils.flop_counter``; its arguments are the op's, a tensor's
            shape in place of the tensor. None for an op without products.
    """

    def define(fake: Callable) -> Callable:
        name = fake.__name__
        for impl in COMPILED:
            LIBRARY.define(f"{name}.{impl}{signature}", tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"fastcss::{name}.{impl}", fake, lib=LIBRARY)
        if flops is not None:
            register_flop_formula(getattr(torch.ops.fastcss, name))(lambda *shapes, out_shape: flops(*shapes))
        return fake

    return define
