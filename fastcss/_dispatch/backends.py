"""Knows which implementations this machine has, and why one is refused."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from . import nvrtc
from .private_apis import forward_mode, registrations

IMPLEMENTATIONS = ("reference", "composed", "cpu", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# These ops have a GPU kernel that was measured on a GPU against the composed form and won; the rows are in
# benchmarks/results. On CUDA impl="auto" takes only these; an explicit impl= may ask for any.
MEASURED_ON_GPU: dict[str, tuple[str, ...]] = {}


def _load(module: str) -> str | None:
    """Load a compiled module of the package; return None, or the reason why it is not there."""
    library = Path(__file__).parents[1] / f"{module}.abi3.so"
    if not library.exists():
        note = library.with_name(f"{module}.not_built.txt")  # setup.py writes it
        reason = f": {note.read_text().strip()}" if note.exists() else " (see `python -m fastcss info`)"
        return f"{library.name} was not built with this installation{reason}"
    if module == "_cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


def _probe_cuda() -> str | None:
    """Prepare the kernels of the compiled module, or else those compiled at first use; return why there are none."""
    if _NO_CUDA_MODULE is None:
        return None
    reason = nvrtc.why_not()
    if reason:
        return f"{_NO_CUDA_MODULE}, and its kernels cannot be compiled at first use: {reason}"
    from .. import _launchers

    _launchers.register()
    return None


def _probe_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "no CUDA device is there, and TRITON_INTERPRET=1 is not set"
    if interpreting():
        from ..kernels import interpreter

        _NOT_INTERPRETED.update((dtype, interpreter.why_not(dtype)) for dtype in KERNEL_DTYPES)
        if _NOT_INTERPRETED[torch.float32]:
            return _NOT_INTERPRETED[torch.float32]
    from .. import kernels

    kernels.register()
    return None


def interpreting() -> bool:
    """Tell whether Triton runs its kernels in its interpreter, which takes CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


#: dtype → why Triton's interpreter does not take it, or None; empty if the interpreter is not in use.
_NOT_INTERPRETED: dict[torch.dtype, str | None] = {}
_NO_CUDA_MODULE = _load("_cuda")
#: implementation → None, or why it is not available on this machine.
UNAVAILABLE: dict[str, str | None] = {"reference": None, "composed": None, "cpu": _load("_cpu"), "cuda": _probe_cuda()}
UNAVAILABLE["triton"] = _probe_triton()


def _kernels(impl: str, key: str) -> frozenset[str]:
    start, end = "fastcss::", f".{impl}"
    names = registrations(key)
    return frozenset(n[len(start) : -len(end)] for n in names if n.startswith(start) and n.endswith(end))


#: implementation → the raw ops that it has a kernel of.
KERNELS = {
    impl: _kernels(impl, key)
    for impl, key in (("cpu", "CPU"), ("cuda", "CUDA"), ("triton", "CompositeExplicitAutograd"))
}


def describe(impl: str) -> str:
    """Describe ``impl`` on this machine: why it is not available, or which ops it has and how they are compiled."""
    if UNAVAILABLE[impl] or impl not in KERNELS:
        return UNAVAILABLE[impl] or "available"
    way = " by CuPy at first use" if impl == "cuda" and _NO_CUDA_MODULE else ""
    ops = sorted(op for op in KERNELS[impl] if not op.endswith("_backward"))
    return f"available, compiled{way}: {', '.join(ops)}"


_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu") if interpreting() else ("cuda",)}


def why_not(impl: str, x: Tensor, op: str | None = None) -> str | None:
    """Return why ``impl`` cannot run ``op`` (or any op that it has) on tensors like ``x``, or None if it can."""
    if impl in ("reference", "composed"):
        return None
    if UNAVAILABLE[impl]:
        return UNAVAILABLE[impl]
    if op and op not in KERNELS[impl]:
        return "it has no kernel for this op"
    if x.device.type not in _DEVICES[impl]:
        return f"it runs on {' or '.join(_DEVICES[impl])}, and the tensors are on {x.device}"
    if x.dtype not in KERNEL_DTYPES:
        return f"it takes float32, bfloat16 and float16, and the tensors are {x.dtype}"
    if impl == "triton" and x.device.type == "cpu":
        return _NOT_INTERPRETED.get(x.dtype)
    return None


def choose(op: str, impl: str, x: Tensor) -> str:
    """Return the implementation to run: the one asked for, or for "auto" the fastest that can run.

    Within forward-mode differentiation, and in ``torch.onnx.export``, "auto" is "composed".

    Raises:
        ValueError: ``impl`` is unknown.
        RuntimeError: the implementation asked for cannot run here; the message says why.
    """
    if impl == "auto":
        if forward_mode() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()):
            return "composed"  # kernels have no tangents, and ONNX has no operators for them
        for name in ("cpu",) if x.device.type == "cpu" else MEASURED_ON_GPU.get(op, ()):
            if why_not(name, x, op) is None:
                return name
        return "composed"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    reason = why_not(impl, x, op)
    if reason:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run: {reason}")
    return impl
