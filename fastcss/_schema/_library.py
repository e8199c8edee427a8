"""The library of raw ops.

One op has one overload an implementation (``fastcss::multi_lora.cpu``, ``.triton``, …): the graph of a compiled model
names the kernel that runs, and an explicit ``impl=`` can never be rerouted by the dispatcher.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("fastcss", "DEF")
COMPILED = ("cpu", "cuda", "triton")


def define(name: str, signature: str, fake) -> None:
    for impl in COMPILED:
        LIBRARY.define(f"{name}.{impl}{signature}", tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"fastcss::{name}.{impl}", fake, lib=LIBRARY)
