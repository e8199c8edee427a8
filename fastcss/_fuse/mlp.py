"""Runs the second half of a transformer's layer, x + second(gelu(first(norm(x)))), in one piece where it can."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._dispatch import backends
from .._dispatch.autograd import needs_grad
from .._dispatch.private_apis import function_mode_is_enabled, transforms_are_active
from .fused_module import HOOKS, full_name
from .linear import Linear, own_gemm_is_faster


def _takes_bfloat16() -> bool:
    """Tell whether the kernel multiplies bfloat16 on this CPU; if not, it says so."""
    one = torch.ones(1, 1, dtype=torch.bfloat16, device="cpu")
    try:
        torch.ops.fastcss.mlp.cpu(one, one[0], one[0], 1e-6, one, None, one, None)
    except (RuntimeError, NotImplementedError):  # the latter where nothing is compiled
        return False
    return True


DTYPES = (torch.float32, torch.bfloat16) if _takes_bfloat16() else (torch.float32,)
_GELUS = ("transformers.activations.GELUActivation", "torch.nn.modules.activation.GELU")


def norm_and_mlp(x: Tensor, norm: nn.Module, mlp: nn.Module, known: frozenset[str]) -> Tensor:
    """Compute ``x + mlp(norm(x))``: ``x`` is ``[…, C]``; the classes named ``known`` have ``lin1``, ``act``, ``lin2``.

    In one piece nothing is kept of the hidden activations, so only where no gradient is taken, and where nobody could
    tell: linear layers that ``fuse`` has replaced, without hooks, and no mode that watches torch's calls.
    """
    if torch.compiler.is_compiling() or full_name(type(mlp)) not in known or not _runs_in_one_piece(x, norm, mlp):
        return x + mlp(norm(x))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    layers = (mlp.lin1.weight, mlp.lin1.bias, mlp.lin2.weight, mlp.lin2.bias)
    return torch.ops.fastcss.mlp.cpu(rows, norm.weight, norm.bias, norm.eps, *layers).view(x.shape)


def _runs_in_one_piece(x: Tensor, norm: nn.Module, mlp: nn.Module) -> bool:
    layers = (mlp.lin1, mlp.lin2)
    modules = (norm, mlp, mlp.act, *layers)
    return (
        type(norm) is nn.LayerNorm
        and norm.bias is not None
        and norm.normalized_shape == x.shape[-1:]
        and all(isinstance(layer, Linear) and layer.made_of == (Linear, nn.Linear) for layer in layers)
        and full_name(type(mlp.act)) in _GELUS
        and getattr(mlp.act, "approximate", "none") == "none"
        and getattr(mlp.act, "act", nn.functional.gelu) is nn.functional.gelu
        and not any("forward" in vars(m) or any(getattr(m, hooks) for hooks in HOOKS) for m in modules)
        and norm.weight.dtype == norm.bias.dtype == x.dtype
        and all(own_gemm_is_faster(x, layer.weight, layer.bias, DTYPES) for layer in layers)
        and backends.why_not("cpu", x, "mlp") is None
        and not function_mode_is_enabled()
        and not transforms_are_active()
        and not needs_grad(x, norm.weight, norm.bias, *mlp.parameters())
    )
