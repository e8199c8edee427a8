"""Compile what the Triton ops launch, for GPUs that are not there, and read what the compiler made of it.

The ops are called on meta tensors, and a stand-in for Triton's driver turns each launch into a compilation for its
target. That happens in a process of its own, ``python compile_only.py FAMILY [COUNT]``, because there Triton must not
be interpreting. Its rows are kept (``reports.py``).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from reports import ROOT, Reports

LAUNCHES = Path(__file__).with_name("launches")
FAMILIES = sorted(path.stem for path in LAUNCHES.glob("*.py"))
ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have
TENSOR_CORE = {
    80: ("mma.sync",),
    90: ("wgmma.mma_async", "mma.sync"),  # wgmma wants 64 rows; fewer go to mma.sync
    100: ("tcgen05.mma", "mma.sync"),
}


class CompileOnly:
    """Answers what Triton asks of a driver before it launches."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # a cache of compiled kernels for each

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(family: str, count: int | None = None) -> list[dict]:
    """One row for each distinct kernel that a call of the family, a NamedTuple with ``call``, launches.

    Of the first ``count`` calls, where that is given.
    """
    module = importlib.import_module(f"launches.{family}")
    import triton

    launch, compiled = triton.runtime.JITFunction.run, []

    def compile_instead(self, *args, grid, warmup, **kwargs):
        compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    triton.runtime.JITFunction.run = compile_instead
    rows, seen = [], set()
    for architecture in ARCHITECTURES:
        triton.runtime.driver.set_active(CompileOnly(architecture))
        calls = module.CASES + (getattr(module, "HOPPER", ()) if architecture == 90 else ())
        for case in calls[:count]:
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


def compiled_by(family: str, reports: Reports) -> list[dict]:
    """The rows that the program prints for a family, or printed when the kernels were the same."""
    import triton

    sources = [LAUNCHES / f"{family}.py", Path(__file__), *ROOT.joinpath("kernels").glob("*.py")]
    return reports.rows(family, sources, f"triton {triton.__version__}", lambda: run(family))


def run(family: str, *arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, __file__, family, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1], *map(int, sys.argv[2:]))))
