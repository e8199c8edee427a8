"""csrc/cuda compiled by g++ against tests/native/cuda_on_cpu: its kernels and its launchers, run on the CPU."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
DEVICE_CODE, STAND_IN = ROOT / "csrc" / "cuda", ROOT / "tests" / "native" / "cuda_on_cpu"
FLAGS = (
    "-std=c++20", "-O1", "-fPIC", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-attributes",
    "-DTORCH_TARGET_VERSION=0x020a000000000000", "-include", "cuda_runtime.h",
)  # fmt: skip


def build(folder: Path) -> Path:
    """The library, made in ``folder`` once for these sources and this torch; other processes wait for it."""
    sources = [*sorted(DEVICE_CODE.glob("*.cu")), STAND_IN / "fibers.cpp"]
    text = [path.read_bytes() for path in sorted((*DEVICE_CODE.iterdir(), *STAND_IN.iterdir())) if path.is_file()]
    key = hashlib.sha256(b"".join((*text, torch.__version__.encode()))).hexdigest()[:16]
    library = folder / f"cuda_on_cpu-{key}.so"
    includes = [f"-I{path}" for path in (STAND_IN, DEVICE_CODE, *include_paths())]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.name}-{key}.o"
        _run("g++", *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(target))
        return str(target)

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with ThreadPoolExecutor() as pool:
                objects = list(pool.map(compile_one, sources))
            paths = [f"-L{path}" for path in library_paths()]
            # -Bsymbolic: what the stand-in defines is what the launchers call, not torch's function of that name.
            _run("g++", "-shared", "-o", f"{library}.new", *objects, "-Wl,-Bsymbolic", *paths, "-ltorch_cpu", "-ldl")
            Path(f"{library}.new").rename(library)
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


class CudaOnCpu:
    """The library of ``build``, whose launchers serve ``fastcss::<op>.cuda`` for CPU tensors from here on."""

    def __init__(self, path: Path):
        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))
        self.library.launch.restype = ctypes.c_char_p

    def set_order(self, order: int) -> None:
        """A block's warps take turns up (0), down (1) or shuffled (a larger seed)."""
        self.library.set_order(order)

    def launch(self, file: str, name: str, grid: tuple[int, int, int], threads: int, params: bytes) -> None:
        """Stand for fastcss._dispatch.nvrtc.launch_packed."""
        failure = self.library.launch(
            name.encode(), (ctypes.c_uint * 3)(*grid), threads, params, ctypes.c_size_t(len(params))
        )
        if failure:
            raise RuntimeError(f"{name}: {failure.decode()}")
