"""csrc/cuda compiles for three GPU generations without a GPU, as the module and as NVRTC is given it, and does not
spill."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from fastcss._dispatch import nvrtc

FOLDER = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCES = sorted(FOLDER.glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")
FLAGS = (
    "-O3", "-std=c++20", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi,-Werror",
    "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas=-v",
    *(f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES),
)  # fmt: skip
SHARED_MEMORY = 48 * 1024  # bytes that a block can have without asking for more


def _entries(source: str) -> set[str]:
    """The kernels that a file has, by the macro that makes one for each dtype, or by themselves."""
    found = set(re.findall(r"__global__ void __launch_bounds__\([\w:]+\)\s+(\w+)\(", source)) - {"name"}
    found |= {f"{stem}{dtype}" for stem in re.findall(r"(\w+_)##type\(", source) for dtype in ("f32", "bf16", "f16")}
    return found | set(re.findall(r"^FASTCSS_\w+\((\w+_b?f\d+),", source, re.MULTILINE))


#: The files that a launcher asks NVRTC for: those with a kernel. The others are included.
DEVICE_CODE = [path.name for path in sorted(FOLDER.glob("*.cuh")) if _entries(path.read_text())]


def compile_one(source: Path, folder: Path) -> list[dict]:
    """One row for each kernel and architecture."""
    includes = [f"-I{path}" for path in include_paths()]
    command = ["nvcc", *FLAGS, *includes, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return _resources(done.stderr)


def _resources(log: str) -> list[dict]:
    entry = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'(.*?)Used (\d+) registers(.*?)\n", re.DOTALL)
    rows = []
    for kernel, sm, spills, registers, rest in entry.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        rows.append(
            {
                "sm": sm,
                "kernel": kernel,
                "registers": int(registers),
                "spills": sum(map(int, re.findall(r"(\d+) bytes spill", spills))),  # bytes a thread
                "stack": int(re.search(r"(\d+) bytes stack frame", spills)[1]),
                "shared": int(shared[1]) if shared else 0,  # bytes a block
            }
        )
    return rows


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_without_spills(source, reports, tmp_path, record_table):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[-2]
    sources = [source, *FOLDER.glob("*.cuh"), *FOLDER.glob("*.h")]
    compiler = f"nvcc {version}, torch {torch.__version__}"
    rows = reports.rows(f"cuda_{source.stem}", sources, compiler, lambda: compile_one(source, tmp_path))
    files = [file for file in DEVICE_CODE if file.startswith(source.stem)]
    entries = {name for file in files for name in _entries(nvrtc.source(file))}
    assert {(row["kernel"], row["sm"]) for row in rows} == {(name, sm) for name in entries for sm in ARCHITECTURES}

    def family(row: dict) -> tuple[str, str]:
        return re.sub(r"_b?f\d+$", "", row["kernel"]), row["sm"]

    for _, alike in groupby(sorted(rows, key=family), family):
        record_table("compiled CUDA kernels", max(alike, key=lambda row: row["registers"]))
    for row in rows:
        assert row["spills"] == row["stack"] == 0, row
        assert row["shared"] <= SHARED_MEMORY, row


@pytest.mark.parametrize("file", DEVICE_CODE)
def test_device_code_asks_nvrtc_for_no_header(file):
    assert "#include" not in nvrtc.source(file)
    assert "stdint" not in nvrtc.source(file)


@pytest.mark.parametrize("file", DEVICE_CODE)
def test_nvrtc_compiles(file):
    library = _load_nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = nvrtc.source(file).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"fastcss.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(b"--std=c++17", b"--gpu-architecture=sm_90")
    status = library.nvrtcCompileProgram(program, len(options), options)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, log.value.decode()


def _load_nvrtc() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(path) for path in (spec.submodule_search_locations if spec else ())]
    packaged = sorted(str(path) for folder in folders for path in folder.glob("*/lib/libnvrtc.so.1?"))
    for name in ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", *packaged):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("libnvrtc is not here: it comes with a CUDA build of torch")
