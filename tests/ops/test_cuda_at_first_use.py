"""csrc/cuda as CuPy compiles it at first use, on a GPU that has the compiled module too: the same values."""

from __future__ import annotations

import pytest
import torch
from calls import DTYPES, normal
from left_out import ON_A_GPU
from torch import Tensor

from fastcss._dispatch import backends, nvrtc
from fastcss._launchers import LAUNCHERS


def both(op: str, *arguments) -> tuple[Tensor, ...]:
    """Check that both launchers give the same, and return it."""
    compiled, at_first_use = getattr(torch.ops.fastcss, op).cuda(*arguments), LAUNCHERS[op](*arguments)
    assert len(compiled) == len(at_first_use)
    for one, other in zip(compiled, at_first_use, strict=True):
        torch.testing.assert_close(other, one, equal_nan=True)
    return compiled


@pytest.fixture
def inputs(device):
    """``inputs(*shape, dtype)``, where there are both."""
    for reason in (nvrtc.why_not(), backends._NO_CUDA_MODULE):
        if reason:
            pytest.skip(reason)
    return lambda *shape, dtype, seed=0: normal(*shape, seed=seed, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@ON_A_GPU
def test_selection(inputs, dtype):
    both("top_classes", inputs(3, 900, dtype=dtype), 7)
    masks, scores = 3 * inputs(11, 16, 20, dtype=dtype), inputs(11, dtype=dtype).abs()
    order = scores.argsort(descending=True, stable=True)
    both("merge_masks", masks, scores, order, 45, 70, 50, 77, 0.5, True)
    tokens, classes = inputs(2, 130, 24, dtype=dtype), inputs(2, 37, 24, dtype=dtype, seed=1)
    for best_only in (False, True):
        selected, _, presence, *saved = both("select_tokens", tokens, classes, 0.1, 60, best_only)
        both("select_tokens_backward", selected, presence, tokens, classes, *saved)


@pytest.mark.parametrize("dtype", DTYPES)
@ON_A_GPU
def test_prompt_mlp(inputs, dtype):
    shapes = ((5, 33), (6, 33, 40), (6, 40), (6, 40, 72), (6, 72))
    z, w1, b1, w2, b2 = (inputs(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    index = torch.tensor([1, -1, 5, 5, 0], device=z.device)
    y, hidden = both("prompt_mlp", z, w1, b1, w2, b2, index)
    both("prompt_mlp_backward", y, z, w1, w2, index, hidden, True, True)
