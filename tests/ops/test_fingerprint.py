"""Tests that a fingerprint tells whether tensors have changed: each of their bytes, their dtype and their shape."""

from __future__ import annotations

import pytest
import torch

from fastcss._dispatch import backends
from fastcss._ops import fingerprint


@pytest.fixture(params=["cpu", "torch"])
def hashed(request, monkeypatch):
    """``hashed(*tensors)`` → an integer each, by the kernel or by torch's own calls."""
    monkeypatch.setitem(
        backends.UNAVAILABLE, "cpu", backends.UNAVAILABLE["cpu"] if request.param == "cpu" else "not this time"
    )
    return lambda *tensors: fingerprint.fingerprints(tensors).tolist()


@pytest.mark.parametrize("size", [1, 3, 8, 9, 255, 256, 257, 264, 65536, 65537, 200_001])
def test_every_byte_counts(hashed, size):
    """Blocks of 256 bytes, chunks of 65,536, and what is left of both."""
    tensor = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    (before,) = hashed(tensor)
    for at in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed[at] += 1
        assert hashed(changed) != [before], at
        changed[at] -= 1
        assert hashed(changed) == [before]


def test_dtype_and_shape_count(hashed):
    zeros = (torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64))
    assert len(set(hashed(*zeros))) == 4


def test_strides_do_not_count(hashed):
    tensor = torch.randn(5, 7)
    one, other = hashed(tensor, tensor.t().contiguous().t())
    assert one == other
