"""Tests the CPU kernels for smaller instruction sets, which ATEN_CPU_CAPABILITY chooses for torch's kernels, too."""

import os
import subprocess
import sys

import pytest

from fastcss._dispatch import backends

TIME = """
import time, torch, fastcss

x, weight, bias = torch.randn(512, 256), torch.randn(256, 256), torch.randn(256)
lora = fastcss.PackedLora.pack([torch.randn(1, 256)], [torch.randn(256, 1)], [1.0])
torch.set_num_threads(1)
times = {"ours": [], "torch's": []}
for _ in range(20):
    for name, step in (
        ("ours", lambda: fastcss.multi_lora(x, weight, lora, bias, impl="cpu")),
        ("torch's", lambda: torch.nn.functional.linear(x, weight, bias)),
    ):
        start = time.perf_counter()
        step()
        times[name].append(time.perf_counter() - start)
print(min(times["ours"]) / min(times["torch's"]))
"""


def run(capability, *arguments):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def compiled(device):
    if device != "cpu" or backends.UNAVAILABLE["cpu"]:
        pytest.skip("no compiled CPU kernels here")


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_op_is_right(capability):
    run(capability, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "fastcss.selftest", "-k", "cpu-cpu")


@pytest.mark.parametrize(("capability", "at_most"), [("default", 12.0), ("avx2", 4.0)])
def test_sums_are_kept_in_registers(capability, at_most):
    """The kernel is timed against torch's GEMM with AVX2; with sums in memory it takes 20 times as long."""
    assert float(run(capability, "-c", TIME)) < at_most
