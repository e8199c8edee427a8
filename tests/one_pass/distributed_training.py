"""Trains a runner under DistributedDataParallel: ``python distributed_training.py RANK STORE``; the test is rank 0."""

from __future__ import annotations

import datetime
import sys

import peft
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastcss

TASKS = ("task0", "task1", "task2")


def model() -> peft.PeftModel:
    """Build a small model with LoRA and a head of its own for each task."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["4"], init_lora_weights=False)
    adapted = peft.get_peft_model(layers, config, TASKS[0])
    for name in TASKS[1:]:
        adapted.add_adapter(name, config)
    return adapted


def take_steps(adapted: nn.Module, batches: list[list[int]], around=lambda runner: runner) -> None:
    """Train all adapters on ``batches`` of samples."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    runner = fastcss.one_pass(adapted)
    runner.set_requires_grad()
    called = around(runner)
    optimizer = torch.optim.SGD([p for p in runner.parameters() if p.requires_grad], 0.1)
    for places in batches:
        optimizer.zero_grad()
        called(x[places]).square().mean((1, 2)).sum().backward()
        optimizer.step()


def train(rank: int, store: str) -> nn.Module:
    """Train on this rank's half of each batch; return the model."""
    adapted = model()
    limit = datetime.timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=limit)
    try:
        take_steps(adapted, [[0, 1], [4, 5]] if rank == 0 else [[2, 3], [6, 7]], DistributedDataParallel)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    return adapted


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2])
