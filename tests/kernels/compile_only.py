"""Compile what the Triton ops launch, for GPUs that are not there, and read what the compiler made of it.

The ops are called on meta tensors, and a stand-in for Triton's driver turns each launch into a compilation for its
target. That happens in a process of its own (a test file run as a program), because there Triton must not be
interpreting. Its rows are kept (``reports.py``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from reports import ROOT, report

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have
TENSOR_CORE = {
    80: ("mma.sync",),
    90: ("wgmma.mma_async", "mma.sync"),  # wgmma wants 64 rows; fewer go to mma.sync
    100: ("tcgen05.mma", "mma.sync"),
}


class CompileOnly:
    """What Triton asks of a driver before it launches."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # a cache of compiled kernels for each

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(cases: dict[int, Sequence]) -> list[dict]:
    """One row for each distinct kernel that a case of an architecture, a NamedTuple with ``call``, launches.

    Of the first N cases, where that is the program's argument.
    """
    import triton

    launch, compiled = triton.runtime.JITFunction.run, []

    def compile_instead(self, *args, grid, warmup, **kwargs):
        compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    triton.runtime.JITFunction.run = compile_instead
    rows, seen, end = [], set(), int(sys.argv[1]) if len(sys.argv) > 1 else None
    for architecture, calls in cases.items():
        triton.runtime.driver.set_active(CompileOnly(architecture))
        for case in calls[:end]:
            case.call()
            for kernel in compiled:
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    rows.append({"sm": architecture, **_resources(kernel, architecture), **case._asdict()})
            compiled.clear()
    return rows


def _resources(kernel, architecture: int) -> dict:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    ptx = kernel.asm["ptx"]
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": sum(int(re.search(rf"{kind}:(\d+)", usage)[1]) for kind in ("STACK", "LOCAL")),  # bytes a thread
        "shared": kernel.metadata.shared,  # bytes a block
        "dots": "tt.dot" in kernel.asm["ttir"],
        "instructions": {name: ptx.count(name) for name in TENSOR_CORE[architecture] if name in ptx},
    }


def compiled_by(program: str) -> list[dict]:
    """The rows that the test file ``program`` prints when it is run, or printed when the kernels were the same."""
    triton = pytest.importorskip("triton")
    sources = [Path(program), Path(__file__), *ROOT.joinpath("kernels").glob("*.py")]
    return report(Path(program).stem, sources, f"triton {triton.__version__}", lambda: run(program))


def run(program: str, *arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(compiled: list[dict], architecture: int, kernels: set[str], record_table) -> None:
    """These kernels and no other; nothing spills, shared memory is enough, and 16-bit products are done on tensor cores
    where there are any."""
    rows = [row for row in compiled if row["sm"] == architecture]
    assert {row["kernel"] for row in rows} == kernels
    columns = ("sm", "kernel", "dtype", "warps", "registers", "spills", "shared")
    for row in rows:
        record_table("compiled Triton kernels", {name: row[name] for name in columns})
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[architecture], row
        if row["dtype"] != "float32" and row["dots"]:  # float32 products are exact, which no tensor core does
            assert row["instructions"], f"no tensor-core instruction: {row}"
