"""Compiles the kernels of csrc/cuda on the machine that runs them, by NVRTC through CuPy: for an installation without
the compiled module. Nothing is compiled, and CuPy is not imported, before an op's first call.

What the launchers of ``fastcss/_launchers`` share is here."""

from __future__ import annotations

import importlib.util
import re
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

WARP = 32
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def why_not() -> str | None:
    """None where the kernels can be compiled and run, else the reason."""
    if importlib.util.find_spec("cupy") is None:
        return "the package cupy is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device is there"
    try:  # the part of CuPy that finds the library, by which CuPy itself does; all of CuPy takes a second to import
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return f"CuPy finds no NVRTC ({reason}): install it with the extra that has it, cupy-cuda13x[ctk]"
    return None


def folder() -> Path:
    """Find the kernels' sources: in the package if it is installed, in csrc/cuda of a checkout."""
    installed = Path(__file__).parents[1] / "cuda"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "csrc" / "cuda"


def _text(file: str) -> str:
    return (folder() / file).read_text()


def source(file: str) -> str:
    """A file of csrc/cuda with what it includes in place of its includes: CuPy's cache of compiled kernels knows the
    text that it is given, and no file beside it."""
    seen: set[str] = set()

    def read(name: str) -> str:
        text = "" if name in seen else _text(name).replace("#pragma once", "")
        seen.add(name)
        return re.sub(r'#include "(.+)"', lambda include: read(include[1]), text)

    return read(file)


@cache
def constant(file: str, name: str) -> int:
    """The number that a kernel's source gives ``name``."""
    return int(re.search(rf"constexpr int {name} = (\d+);", _text(file))[1])


@cache
def _module(file: str, device: int):
    import cupy

    with cupy.cuda.Device(device):
        return cupy.RawModule(code=source(file), options=("--std=c++17",))


def launch_with_cupy(file: str, name: str, grid: tuple[int, int, int], threads: int, params: bytes) -> None:
    """Launch a kernel of csrc/cuda/<file>, which takes one struct, on torch's current device and stream."""
    import cupy
    import numpy

    device = torch.cuda.current_device()
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        # CuPy passes an array of one element by value.
        struct_of_params = numpy.frombuffer(params, dtype=f"V{len(params)}")
        _module(file, device).get_function(name)(grid, (threads, 1, 1), (struct_of_params,))


#: Replaced where the kernels run on something else.
launch_packed = launch_with_cupy


def launch(
    file: str, name: str, dtype: torch.dtype | None, grid: Sequence[int], *params: Tensor | int | float | None,
    threads: int | None = None,
) -> None:  # fmt: skip
    """Each parameter is a member of the struct, 8 bytes all of them: a tensor's address, an integer or a double."""
    if 0 in grid:
        return
    values = [0 if p is None else p.data_ptr() if isinstance(p, Tensor) else p for p in params]
    packed = struct.pack("".join("d" if isinstance(v, float) else "q" for v in values), *values)
    name = name if dtype is None else f"{name}_{_TYPES[dtype]}"
    with torch.cuda.device_of(next(p for p in params if isinstance(p, Tensor))):
        launch_packed(file, name, (*grid, 1, 1)[:3], threads or constant(file, "kThreads"), packed)


def blocks(count: int, each: int) -> int:
    return -(-count // each)


#: raw op → its launcher.
LAUNCHERS: dict[str, Callable] = {}


def launcher(function: Callable) -> Callable:
    """Make ``function`` the launcher of the raw op of its name."""
    if LAUNCHERS.setdefault(function.__name__, function) is not function:
        raise RuntimeError(f"{function.__name__} has a launcher already, in {LAUNCHERS[function.__name__].__module__}")
    return function
