"""Linear layers on the project's own GEMM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from .._linear import linear
from .base import Fused


class Linear(Fused):
    """In float32 on an AMD CPU with AVX-512, where that GEMM is the faster; elsewhere torch's own."""

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
        if name == "qconfig":  # what torch.ao asks each module for, to pass over this one without a word
            raise RuntimeError(
                f"fuse: torch.ao.quantization replaces modules that are torch.nn.Linear itself, and this one is a "
                f"{type(self).__name__}: undo the fusion before (Fusion.undo), and fuse what quantization gives"
            )
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        else:  # TorchScript does not compile this branch, and would what followed the if
            return self._forward(input)

    @torch.jit.unused
    def _forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or has_torch_function_variadic(input, self.weight):
            return super().forward(input)  # whoever watches or replaces torch's calls has to see a linear
        return linear(input, self.weight, self.bias)
