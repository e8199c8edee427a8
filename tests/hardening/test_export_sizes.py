"""Tests torch.export of every op with open sizes: one program must serve all sizes, and learn as the op does."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from calls import normal
from torch import Tensor, nn
from torch.export import Dim

from fastcss import PackedLora, multi_lora, ops
from fastcss.nn import LSMSegHead

LORA = PackedLora.pack([normal(4, 8), normal(2, 8)], [normal(16, 4), normal(16, 2)], [1.0, 0.5])
WEIGHT = normal(16, 8)
BIAS = normal(2, 9, 9)
TABLE = normal(5, 3)
GENERATORS = normal(3, 4, 5), normal(3, 5), normal(3, 5, 6), normal(3, 6)


class Case(NamedTuple):
    """``make(n)`` gives tensors all of whose sizes named in ``open`` follow from n; ``open`` has a string a tensor."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[int], tuple[Tensor, ...]]
    open: tuple[str, ...]


def numbers(n: int, *shape: int) -> Tensor:
    """Draw one of three classes for each pixel."""
    return torch.arange(n * torch.Size(shape).numel()).view(n, *shape) % 3


CASES = {
    "multi_lora": Case(lambda x: multi_lora(x, WEIGHT, LORA), lambda n: (normal(n, n + 1, 8),), ("01",)),
    "multi_lora, rows": Case(lambda x: multi_lora(x, WEIGHT, LORA), lambda n: (normal(n, 8),), ("0",)),
    "multi_lora, routed": Case(
        lambda x, i: multi_lora(x, WEIGHT, LORA, mode="routed", index=i),
        lambda n: (normal(n, n + 2, 3, 8), torch.arange(n) % 2),
        ("01", "0"),
    ),
    "affinity_attention": Case(ops.affinity_attention, lambda n: normal(3, n, n + 1, 4).unbind(), ("01",) * 3),
    "class_affinity": Case(
        ops.class_affinity,
        lambda n: (*normal(3, n, n + 9, 4).unbind(), normal(n, 2, 4)),
        ("01", "01", "01", "0"),
    ),
    "affinity_loss": Case(
        ops.affinity_loss, lambda n: (*normal(2, n, 2 * n, 4).unbind(), numbers(n, n, 2)), ("01", "01", "01")
    ),
    "class_centers": Case(ops.class_centers, lambda n: (normal(n, 3, n + 1), normal(n, n + 1, 5)), ("02", "01")),
    "cost_filter": Case(
        lambda image, text: ops.cost_filter(image, text, 3),
        lambda n: (normal(n, n + 1, n + 2, 5), normal(n + 9, 2, 5, seed=1)),
        ("012", "0"),
    ),
    "cost_filter, all classes": Case(
        lambda image, text: ops.cost_filter(image, text, 30),
        lambda n: (normal(n, n + 1, n + 2, 5), normal(n + 4, 2, 5, seed=1)),
        ("012", "0"),
    ),
    "scatter_cost": Case(
        lambda image, text: ops.scatter_cost(ops.cost_filter(image, text, 3), text.shape[0]),
        lambda n: (normal(n, n + 1, n + 2, 5), normal(n + 9, 2, 5, seed=1)),
        ("012", "0"),
    ),
    "filtered_argmax": Case(
        lambda image, text: ops.filtered_argmax(ops.cost_filter(image, text, 3)),
        lambda n: (normal(n, n + 1, n + 2, 5), normal(9, 2, 5, seed=1)),
        ("012", ""),
    ),
    "top_classes": Case(lambda score: ops.top_classes(score, 3), lambda n: (normal(n, n + 4),), ("01",)),
    "phrase_pool": Case(ops.phrase_pool, lambda n: (normal(n, 5), normal(n + 1, n + 2, 5)), ("0", "01")),
    "select_tokens": Case(
        lambda tokens, classes: ops.select_tokens(tokens, classes, threshold=0.1, length=7),
        lambda n: (normal(n, n + 2, 5), normal(n, n + 3, 5, seed=1)),
        ("01", "01"),
    ),
    "prompt_mlp": Case(
        lambda z, index: ops.prompt_mlp(z, *GENERATORS, index), lambda n: (normal(n, 4), numbers(n)), ("0", "0")
    ),
    "merge_masks": Case(
        lambda masks, scores: ops.merge_masks(masks, scores, (13, 17)),
        lambda n: (normal(n, n + 5, n + 6), normal(n)),
        ("012", "0"),
    ),
    "topk_queries": Case(
        lambda features: ops.topk_queries(features, GENERATORS[1], 4), lambda n: (normal(n, n + 7, 5),), ("01",)
    ),
    "top_margin": Case(
        ops.top_margin, lambda n: (normal(n, 4, n + 1, n + 2), numbers(n, n + 1, n + 2)), ("023", "012")
    ),
    "deformable_attention": Case(
        lambda value, *rest: ops.deformable_attention(value.flatten(1, 2), [value.shape[1:3]], *rest),
        lambda n: (
            normal(n, n + 1, n + 2, 2, 3),
            normal(n, n + 3, 1, 2).sigmoid(),
            normal(n, n + 3, 2, 1, 2, 2),
            normal(n, n + 3, 2, 1, 2),
        ),
        ("012", "01", "01", "01"),
    ),
    "bi_attention": Case(
        lambda q, k: ops.bi_attention(q, k, q, k),
        lambda n: (normal(n, n + 4, 2, 3), normal(n, n + 1, 2, 3)),
        ("01",) * 2,
    ),
    "window_attention": Case(
        lambda q: ops.window_attention(q, q, q, BIAS, 3, shift=1),
        lambda n: (normal(n, n + 4, n + 5, 2, 3),),
        ("012",),
    ),
    "relative_attention": Case(
        lambda q: ops.relative_attention(q, q, q, TABLE, TABLE, window=3),
        lambda n: (normal(n, n + 4, n + 5, 2, 3),),
        ("012",),
    ),
}


class Calls(nn.Module):
    def __init__(self, call: Callable) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.call(*tensors)


@pytest.mark.parametrize("name", CASES)
def test_any_size(name):
    case = CASES[name]
    sizes = tuple({int(dim): Dim.DYNAMIC for dim in open_} for open_ in case.open)
    program = torch.export.export(Calls(case.call), case.make(4), dynamic_shapes=(sizes,)).module()
    for n in (2, 7):
        results, grads = zip(*(_learn(call, case.make(n)) for call in (program, case.call)), strict=True)
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*grads)


def _learn(call: Callable, tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    results = call(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    floats = [y.square().sum() for y in results if y.requires_grad]
    if floats:
        sum(floats).backward()
    return [y.detach() for y in results], [t.grad for t in leaves]


def test_any_batch_of_a_head():
    head = LSMSegHead(16, hidden=8, heads=2, window=4, upsample_channels=(8, 4), layers=1, k=5).eval()
    text = normal(9, 1, 16)
    sizes = {"image": {0: Dim.DYNAMIC}, "text": {0: Dim.DYNAMIC}}
    program = torch.export.export(head, (normal(3, 16, 6, 7), text), dynamic_shapes=sizes).module()
    for batch, classes in ((2, 9), (5, 7)):
        inputs = normal(batch, 16, 6, 7), text[:classes]
        torch.testing.assert_close(program(*inputs), head(*inputs))


def test_a_program_from_a_file_learns():
    """The graph names the raw op, without the op's Python: the raw op's gradient must be the op's."""
    program = torch.export.export(Calls(CASES["multi_lora"].call), (normal(4, 5, 8),))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    _, got = _learn(torch.export.load(file).module(), (normal(4, 5, 8),))
    _, want = _learn(CASES["multi_lora"].call, (normal(4, 5, 8),))
    torch.testing.assert_close(got, want)
