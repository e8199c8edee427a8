"""Gathers all private APIs of torch, Triton and transformers that the package uses.

Any release may move any of them. Each move is then one line here, and ``tests/test_private_apis.py`` says what stops.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction, _functorch
from torch._C import _after_autograd_keyset as after_autograd_keyset
from torch._C import _any_requires_grad as any_requires_grad
from torch._C import _are_functorch_transforms_active as transforms_are_active
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch._C import _dispatch_get_registrations_for_dispatch_key as registrations
from torch._C import _get_dispatch_mode as dispatch_mode
from torch._C import _get_tracing_state as tracing_state
from torch._C import _is_any_autocast_enabled as any_autocast_is_enabled
from torch._C import _is_torch_function_mode_enabled as function_mode_is_enabled
from torch._C import _len_torch_function_stack as function_modes
from torch._C import _TorchDispatchModeKey as DispatchModeKey
from torch._C._functorch import _add_batch_dim as with_vmap_axis
from torch._C._functorch import _unwrap_batched as without_vmap_axis
from torch._C._functorch import get_unwrapped
from torch._C._functorch import is_batchedtensor as is_vmapped
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack as beneath_transform
from torch._ops import HigherOrderOperator
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled as forward_mode_enabled
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "CHECKPOINT_FUNCTION",
    "BelowAutograd",
    "DisableTorchFunction",
    "DispatchModeKey",
    "HigherOrderOperator",
    "SingleLevelFunction",
    "TorchDispatchMode",
    "after_autograd_keyset",
    "any_autocast_is_enabled",
    "any_requires_grad",
    "beneath_transform",
    "compiled_from",
    "dispatch_mode",
    "dynamo_is_loaded",
    "enable_single_level_autograd_function",
    "forward_mode",
    "forward_mode_enabled",
    "function_mode_is_enabled",
    "function_modes",
    "get_unwrapped",
    "gpu_architecture",
    "has_alias",
    "is_one_graph",
    "is_vmapped",
    "is_wrapped",
    "modules_themselves",
    "pytree",
    "registrations",
    "traced_as_one",
    "tracing_state",
    "transforms_are_active",
    "vmap_level",
    "with_vmap_axis",
    "without_vmap_axis",
]

#: transformers keeps the function that checkpoints a layer under this name, in each module that uses one.
CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"


def forward_mode() -> bool:
    """Tell whether forward-mode derivatives (``torch.func.jvp``, ``forward_ad.dual_level``) are being taken."""
    return forward_ad._current_level >= 0


# This line does what torch.compiler.assume_constant_result does, without its import of the whole compiler. The answer
# is constant: the transforms within a compiled function are entered while it is traced, and torch guards those around.
forward_mode._dynamo_marked_constant = True


def vmap_level() -> int | None:
    """Return the level of ``torch.vmap`` if that is the innermost transform of torch.func, else None."""
    layer = _functorch.peek_interpreter_stack()
    return layer.level() if layer is not None and layer.key() == _functorch.TransformType.Vmap else None


def has_alias(tensor: Tensor) -> bool:
    """Tell whether another tensor uses the storage of ``tensor``."""
    # One count belongs to the tensor, the other to the storage object that this line asks for.
    return tensor._is_view() or torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2


def compiled_from(module: nn.Module) -> nn.Module | None:
    """Return the module that ``torch.compile`` made ``module`` of, or None if ``module`` is not compiled."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")  # if it is not loaded, nothing was compiled
    return module._orig_mod if eval_frame is not None and isinstance(module, eval_frame.OptimizedModule) else None


def dynamo_is_loaded() -> bool:
    """Tell whether something in this process may be compiled."""
    return "torch._dynamo" in sys.modules


def is_one_graph() -> bool:
    """Tell whether what is being compiled has to be one graph (fullgraph=True)."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    root = InstructionTranslator.current_tx().output.root_tx
    return bool(root.one_graph or root.error_on_graph_break)


is_one_graph._dynamo_marked_constant = True


def traced_as_one(function: Callable) -> Callable:
    """Return ``function`` as one that torch.compile does not look into: what it calls is traced beneath autograd."""
    return torch._dynamo.nonstrict_trace(function)


_getattr_of_modules = nn.Module.__getattr__


@contextlib.contextmanager
def modules_themselves() -> Iterator[None]:
    """Let modules' attributes be the modules themselves within a trace of torch.export.

    If a module of the model has two names, torch.export gives a stand-in at each access: another one each time, of a
    class made for it, and only for modules that are inside of what it traces.
    """
    in_trace, nn.Module.__getattr__ = nn.Module.__getattr__, _getattr_of_modules
    try:
        yield
    finally:
        nn.Module.__getattr__ = in_trace


def gpu_architecture() -> int:
    """Return the architecture that Triton compiles for, for example 90 for sm_90."""
    import triton

    return triton.runtime.driver.active.get_current_target().arch
