"""The affinity ops on CUDA: no host sync, forward or backward, and the same bits when a captured graph is replayed."""

from __future__ import annotations

import checks
import pytest
import torch
from calls import Call, normal
from left_out import ON_A_GPU

from fastcss import ops

BATCH, PIXELS, KEYS, WIDTH, CLASSES = 2, 300, 32, 80, 21


def call_of(op: str, device: str) -> Call:
    """Make a call in bfloat16 whose sizes leave every kernel a partial tile."""
    tensors = {
        "q": (BATCH, PIXELS, KEYS),
        "k": (BATCH, PIXELS, KEYS),
        "v": (BATCH, PIXELS, WIDTH),
        "feats": (BATCH, PIXELS, WIDTH),
        "centers": (BATCH, CLASSES, WIDTH),
        "logits": (BATCH, CLASSES, PIXELS),
    }
    arguments = {
        "affinity_attention": ("q", "k", "v"),
        "class_affinity": ("q", "k", "feats", "centers"),
        "affinity_loss": ("q", "k"),
        "class_centers": ("logits", "feats"),
    }[op]
    made = {
        name: normal(*tensors[name], seed=seed, dtype=torch.bfloat16, device=device)
        for seed, name in enumerate(arguments)
    }
    labels = torch.arange(BATCH * PIXELS, device=device).reshape(BATCH, PIXELS) % CLASSES
    return Call(getattr(ops, op), made, {"labels": labels} if op == "affinity_loss" else {})


@pytest.mark.parametrize("op", ["affinity_attention", "class_affinity", "affinity_loss", "class_centers"])
@pytest.mark.parametrize("impl", ["composed", "triton"])
@ON_A_GPU
def test_cuda_graph_replays_without_a_sync(impl, op, device):
    call = call_of(op, device).leaves()
    dys = call.output_gradients()
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = call.results(impl, dys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call.results(impl, dys)
    graph.replay()
    checks.assert_bitwise(got, want)
