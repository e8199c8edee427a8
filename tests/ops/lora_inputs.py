"""A call of multi_lora with its inputs, and its comparison with the float64 reference."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from fastcss import PackedLora, multi_lora

RANKS = (3, 0, 32, 1, 24)


class Inputs(NamedTuple):
    """The tensors of one call, in the order of its gradients."""

    x: torch.Tensor
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    lora: PackedLora  # ranks, offsets, scales
    mode: str
    index: torch.Tensor | None

    def leaves(self, dtype: torch.dtype | None = None) -> Inputs:
        """New leaves that require gradients, with the strides these have."""
        tensors = (t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in self[:5])
        return Inputs(*tensors, *self[5:])

    def call(self, impl: str) -> torch.Tensor:
        lora = dataclasses.replace(self.lora, a=self.a, b=self.b)
        return multi_lora(self.x, self.weight, lora, self.bias, mode=self.mode, index=self.index, impl=impl)

    def results(self, impl: str, dy: torch.Tensor) -> dict[str, torch.Tensor]:
        """The output and the gradient of every input."""
        y = self.call(impl)
        given = {name: t for name, t in zip(self._fields[:5], self[:5], strict=True) if t is not None}
        gradients = torch.autograd.grad(y, list(given.values()), dy.to(y.dtype), materialize_grads=True)
        return {"y": y.detach(), **dict(zip(given, gradients, strict=True))}


def make(mode, rows, k, n, ranks, *, index=None, bias=True, dtype=torch.float32, lora_dtype=None, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    slots = () if mode == "shared" else (len(ranks) if mode == "diverged" else len(index),)
    lora_a = [normal(r, k, dtype=lora_dtype or dtype) for r in ranks]
    lora_b = [normal(n, r, dtype=lora_dtype or dtype) for r in ranks]
    lora = PackedLora.pack(lora_a, lora_b, [0.5 + 0.25 * t for t in range(len(ranks))])
    index = None if index is None else torch.tensor(index, dtype=torch.int64, device=device)
    return Inputs(
        normal(*slots, *rows, k), normal(n, k), lora.a, lora.b, normal(n) if bias else None, lora, mode, index
    )  # fmt: skip


def output_gradient(inputs: Inputs) -> torch.Tensor:
    slots = inputs.lora.num_adapters if inputs.index is None else inputs.index.shape[0]
    inner = inputs.x.shape[:-1] if inputs.mode == "shared" else inputs.x.shape[1:-1]
    shape = (slots, *inner, inputs.weight.shape[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs.x.device, inputs.x.dtype)


def assert_as_good_as_eager(inputs: Inputs, impl: str, tolerance: float, dy: torch.Tensor | None = None) -> None:
    """Values and gradients are no further from the float64 reference than those of the literal eager code."""
    dy = output_gradient(inputs) if dy is None else dy
    exact = inputs.leaves(torch.float64).results("reference", dy)
    eager = inputs.leaves().results("reference", dy)
    ours = inputs.leaves().results(impl, dy)
    for name, want in exact.items():
        assert ours[name].shape == want.shape, name
        assert ours[name].dtype == eager[name].dtype, name
        if want.numel() == 0:
            continue
        for order in (2, float("inf")):
            limit = 1.2 * _error(eager[name], want, order) + tolerance
            assert _error(ours[name], want, order) <= limit, (name, order)


def _error(got: torch.Tensor, want: torch.Tensor, order: float) -> float:
    """The distance in a norm, relative to ``want``."""
    size = torch.linalg.vector_norm(want, order).item()
    return torch.linalg.vector_norm(got.double() - want, order).item() / (size or 1.0)
