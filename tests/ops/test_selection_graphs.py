"""The cost filter, the selection ops and those of the model's own pass on CUDA: no host sync, forward or backward, and
the same bits when a captured graph is replayed, also on other values."""

from __future__ import annotations

import checks
import pytest
import torch
from calls import Call, normal
from left_out import ON_A_GPU
from torch import Tensor

from fastcss import ops

BATCH, TOKENS, WIDTH, CLASSES = 2, 300, 80, 21

SHAPES = {
    "cost_filter": {"image": (BATCH, 12, 13, WIDTH), "text": (CLASSES, 3, WIDTH)},
    "top_classes": {"score": (BATCH, 847)},
    "phrase_pool": {"cls": (BATCH, WIDTH), "phrases": (CLASSES, 7, WIDTH)},
    "select_tokens": {"tokens": (BATCH, TOKENS, WIDTH), "classes": (BATCH, CLASSES, WIDTH)},
    "prompt_mlp": {"z": (9, WIDTH), "w1": (5, WIDTH, 33), "b1": (5, 33), "w2": (5, 33, 65), "b2": (5, 65)},
    "merge_masks": {"masks": (CLASSES, 33, 31), "scores": (CLASSES,)},
    "topk_queries": {"features": (BATCH, TOKENS, WIDTH), "prototypes": (CLASSES, WIDTH)},
    "top_margin": {"logits": (BATCH, CLASSES, TOKENS)},
    "deformable_attention": {
        "value": (BATCH, 12 * 13 + 6 * 7, 3, WIDTH),
        "reference_points": (BATCH, TOKENS, 2, 2),
        "offsets": (BATCH, TOKENS, 3, 2, 4, 2),
        "logits": (BATCH, TOKENS, 3, 2, 4),
    },
}
CUDA = ("top_classes", "select_tokens", "prompt_mlp", "merge_masks")
CASES = [(op, impl) for op in SHAPES for impl in ("composed", "triton", *(["cuda"] if op in CUDA else []))]
#: The gradient of grid_sample is not the same twice on CUDA.
REPLAYED = [case for case in CASES if case != ("deformable_attention", "composed")]


def call_of(op: str, device: str, seed: int = 0) -> Call:
    """Make a call in bfloat16 whose sizes leave every kernel a partial tile."""
    tensors = {
        name: normal(*shape, seed=seed + i, dtype=torch.bfloat16, device=device)
        for i, (name, shape) in enumerate(SHAPES[op].items())
    }
    options = {
        "cost_filter": {"k": 5},
        "top_classes": {"k": 32},
        "select_tokens": {"threshold": 0.1, "length": 200},
        "prompt_mlp": {"index": (torch.arange(9, device=device) + seed) % 6 - 1},
        "merge_masks": {"size": (97, 150), "crop": (100, 124), "return_score": True},
        "topk_queries": {"k": 40},
        "deformable_attention": {"spatial_shapes": [(12, 13), (6, 7)]},
        "top_margin": {"labels": torch.arange(BATCH * TOKENS, device=device).view(BATCH, TOKENS) % CLASSES},
    }
    return Call(getattr(ops, op), tensors, options.get(op, {}))


@pytest.mark.parametrize(("op", "impl"), REPLAYED)
@ON_A_GPU
def test_cuda_graph_replays_without_a_sync(op, impl, device):
    call, other = (call_of(op, device, seed).leaves() for seed in (0, 50))
    dys = call.output_gradients()
    call.results(impl, dys)  # a kernel that is compiled at first use is
    torch.cuda.set_sync_debug_mode("error")
    try:
        want, wanted = (c.results(impl, dys) for c in (call, other))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call.results(impl, dys)
    graph.replay()
    checks.assert_bitwise(got, want)
    with torch.no_grad():
        for mine, new in zip(_tensors(call), _tensors(other), strict=True):
            mine.copy_(new)
    graph.replay()
    checks.assert_bitwise(got, wanted)


def _tensors(call: Call) -> list[Tensor]:
    return [*call.tensors.values(), *(v for v in call.options.values() if isinstance(v, Tensor))]


@pytest.mark.parametrize(("op", "impl"), [case for case in CASES if case[1] == "composed"])
def test_the_calls_run(op, impl, device):
    """So that what only CUDA sees is not wrong there."""
    call = call_of(op, device).leaves()
    found = call.results(impl, call.output_gradients())
    assert set(found) >= {f"d{name}" for name in call.tensors} or op in ("top_classes", "merge_masks", "topk_queries")
