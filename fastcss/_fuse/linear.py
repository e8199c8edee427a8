"""Runs linear layers without adapters on the project's own GEMM where that is faster."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from .._dispatch import backends
from .._dispatch.private_apis import forward_mode, tracing_state
from .._ops.multi_lora import multi_lora
from ..packed_lora import PackedLora
from .fused_module import Fused


def _mkl_lacks_this_cpu() -> bool:
    """Tell whether MKL, torch's GEMM, leaves half of the CPU idle: it takes no AVX-512 path on AMD."""
    cpuinfo = Path("/proc/cpuinfo")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or not cpuinfo.exists():
        return False
    with cpuinfo.open() as lines:  # the first lines name the vendor
        return any("AuthenticAMD" in line for _, line in zip(range(4), lines, strict=False))


# The own micro-kernel against torch's linear on one thread of an AMD EPYC (Zen 5): in float32 it is 1.7 to 2.3 times as
# fast from 96 rows on, equal at 18, slower at 1; in bfloat16 0.5 to 1.0 times as fast. On Zen 3 with AVX2 it is 0.4 to
# 1.0 times as fast.
OWN_GEMM_LEADS = _mkl_lacks_this_cpu()
FEWEST_ROWS = 16
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``torch.nn.functional.linear``, on the faster of the two GEMMs."""
    if not own_gemm_is_faster(x, weight, bias):
        return F.linear(x, weight, bias)
    return multi_lora(x, weight, _no_adapter(*weight.shape), bias)[0]


def own_gemm_is_faster(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtypes: Collection[torch.dtype] = (torch.float32,)
) -> bool:
    """Tell whether the project's own GEMM can run this linear layer, and leads there, in one of ``dtypes``."""
    return (
        OWN_GEMM_LEADS
        and x.dtype in dtypes
        and all(type(t) in _PLAIN for t in (x, weight, bias))  # a subclass (quantised, fake, …) has a linear of its own
        and x.device.type == "cpu"
        and all(t is None or t.dtype == x.dtype for t in (weight, bias))
        and weight.dim() == 2
        and math.prod(x.shape[:-1]) >= FEWEST_ROWS
        and not torch.is_autocast_enabled("cpu")
        and tracing_state() is None  # torch.jit.trace records torch's own calls
        and not forward_mode()  # torch's linear has tangents
        and backends.why_not("cpu", x) is None
    )


@functools.cache
def _no_adapter(width_out: int, width_in: int) -> PackedLora:
    with torch.inference_mode(False):
        return PackedLora.pack([torch.empty(0, width_in)], [torch.empty(width_out, 0)], [0.0])


class Linear(Fused):
    """Runs on the own GEMM in float32 on an AMD CPU with AVX-512, where it is faster, and elsewhere on torch's."""

    op = "linear"
    classes = frozenset(("torch.nn.modules.linear.Linear",))
    gives_weights = True

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        if type(module.weight) is not nn.Parameter:
            return f"its weight is a {type(module.weight).__name__}"
        if "qconfig" in vars(module):
            return "torch.ao.quantization is about to quantize it"
        return super().why_not(module)

    def __getattr__(self, name: str) -> object:
        if name == "qconfig":  # torch.ao asks each module for it, and would pass over this one silently
            raise RuntimeError(
                f"fuse: torch.ao.quantization replaces modules that are torch.nn.Linear itself, and this one is a "
                f"{type(self).__name__}: undo the fusion before (Fusion.undo), and fuse what quantization gives"
            )
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        else:  # TorchScript does not compile this branch; without the else it would compile the return below
            return self._forward(input)

    @torch.jit.unused
    def _forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or has_torch_function_variadic(input, self.weight):
            return super().forward(input)  # code that watches or replaces torch's calls has to see a linear
        return linear(input, self.weight, self.bias)
