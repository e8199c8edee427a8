"""A sample gives the same bits in whatever batch: no binary is made for the size of one, and no sum crosses samples."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "kernels"


def kernels() -> list[tuple[str, list[str], str]]:
    """List each kernel as the source has it: its name, its parameters and its decorator."""
    found = []
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                parameters = [argument.arg for argument in node.args.args if argument.annotation is None]
                found.append((f"{path.stem}.{node.name}", parameters, ast.unparse(node.decorator_list[0])))
    return found


def test_no_kernel_is_specialised_for_the_size_of_a_batch():
    """Triton makes other binaries of 1 and of multiples of 16, whose loads may be laid out, and summed, another way."""
    sizes = {"B", "batches", "images"}
    having = [(name, sizes & set(parameters), decorator) for name, parameters, decorator in kernels()]
    assert sum(bool(those) for _, those, _ in having) > 20
    for name, those, decorator in having:
        for size in those:
            assert f"'{size}'" in decorator.partition("do_not_specialize=")[2], (name, size)


def test_the_loss_of_an_image_is_summed_by_itself(device):
    pytest.importorskip("triton")
    from fastcss._dispatch import backends

    if backends.UNAVAILABLE["triton"]:
        pytest.skip(backends.UNAVAILABLE["triton"])
    from fastcss.kernels.affinity_loss import mean_over_pairs

    labels = torch.full((3, 30), -1, device=device)
    labels[1] = 2
    for count in (201, 1500):
        for seed in range(4):
            values = torch.zeros(3, count)
            values[1] = torch.randn(count, generator=torch.Generator().manual_seed(seed)).exp()
            values = values.to(device)
            together = mean_over_pairs(values, labels, -1)
            torch.testing.assert_close(together.double(), values[1].double().sum() / 900, rtol=1e-6, atol=0)
            assert torch.equal(together, mean_over_pairs(values[1:2], labels[1:2], -1)), (count, seed)
    assert torch.equal(mean_over_pairs(together, labels, -1), together / 900)
