"""Every Triton kernel compiles for three GPU generations, with the tiles the host code picks, and without spilling.

No GPU is needed: the ops are called on meta tensors, and a stand-in for Triton's driver turns each launch into a
compilation for its target. That happens in a process of its own (this file run as a program), because there Triton must
not be interpreting.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have
TENSOR_CORE = {
    80: ("mma.sync",),
    90: ("wgmma.mma_async", "mma.sync"),  # wgmma wants 64 rows; fewer go to mma.sync
    100: ("tcgen05.mma", "mma.sync"),
}
SLOTS = 6


class MultiLora(NamedTuple):
    """A call of multi_lora with K = N = width."""

    rows: int
    width: int
    mode: str
    backward: bool = False
    rank: int = 32
    dtype: str = "bfloat16"

    def call(self) -> None:
        import torch

        from fastcss.kernels.multi_lora import multi_lora
        from fastcss.kernels.multi_lora_backward import multi_lora_backward

        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        rows, width, total = self.rows, self.width, SLOTS * self.rank
        x = empty(rows, width) if self.mode == "shared" else empty(SLOTS, rows, width)
        weight, a, b = empty(width, width), empty(total, width), empty(total, width)
        offsets, scales = empty(SLOTS + 1, dtype="int32"), empty(SLOTS, dtype="float32")
        index = empty(SLOTS, dtype="int64") if self.mode == "routed" else None
        if self.backward:
            h = empty(*((rows, total) if index is None else (SLOTS, rows, self.rank)), dtype="float32")
            dy = empty(SLOTS, rows, width)
            multi_lora_backward(dy, x, weight, a, b, offsets, scales, index, h, self.rank, True, True)
        else:
            multi_lora(x, weight, empty(width), a, b, offsets, scales, index, self.rank, False)


# What a case launches is what is compiled; a kernel that an earlier case has launched alike is not shown again. The
# shapes are those that the op has targets for, and then large ranks and float32.
CASES = (
    MultiLora(4096, 256, "shared"),
    MultiLora(4096, 1024, "shared"),
    MultiLora(17821, 256, "shared"),
    MultiLora(17821, 1024, "shared"),
    MultiLora(4096, 256, "diverged"),
    MultiLora(4096, 1024, "diverged"),
    MultiLora(4096, 4096, "diverged"),
    MultiLora(1, 1024, "routed"),
    MultiLora(32, 1024, "diverged"),
    MultiLora(64, 1024, "shared"),
    MultiLora(4096, 1024, "shared", backward=True),
    MultiLora(4096, 1024, "diverged", backward=True),
    MultiLora(64, 1024, "routed", backward=True),
    MultiLora(4096, 1024, "shared", rank=200),
    MultiLora(64, 1024, "routed", rank=128),
    MultiLora(1024, 768, "shared", backward=True, dtype="float32"),
    MultiLora(1024, 768, "diverged", dtype="float32"),
    MultiLora(64, 768, "diverged", dtype="float32"),
)


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


def compile_all() -> list[dict]:
    """One row for each distinct kernel a case launches on an architecture."""
    import triton

    launch, compiled = triton.runtime.JITFunction.run, []

    def compile_instead(self, *args, grid, warmup, **kwargs):
        compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    triton.runtime.JITFunction.run = compile_instead
    rows, seen = [], set()
    for architecture in ARCHITECTURES:
        triton.runtime.driver.set_active(CompileOnly(architecture))
        for case in CASES:
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
        "instructions": {name: ptx.count(name) for name in TENSOR_CORE[architecture] if name in ptx},
    }


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(compiled, architecture, record_table):
    rows = [row for row in compiled if row["sm"] == architecture]
    assert {row["kernel"] for row in rows} == {"shrink_kernel", "expand_kernel", "fused_kernel", "gradient_kernel"}
    for row in rows:
        record_table("compiled kernels", row)
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[architecture], row
        if row["dtype"] != "float32":  # float32 products are exact in float32, which no tensor core does
            assert row["instructions"], f"no tensor-core instruction: {row}"


if __name__ == "__main__":
    print(json.dumps(compile_all()))
