"""Checks what must be true of every kind of drawn scenes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


def assert_item_form(image: Tensor, labels: Tensor, classes: int) -> None:
    """Check a picture and its labels: some are of a class, and all below ``classes``."""
    assert image.shape == (3, 128, 128)
    assert image.dtype == torch.float32
    assert labels.shape == (128, 128)
    assert labels.dtype == torch.int64
    assert image.is_contiguous()
    assert 0 <= image.min() <= image.max() <= 1
    assert 0 <= labels.min() < labels.max() < classes


def assert_same_in_worker_processes(scenes: Dataset) -> None:
    loaded = list(DataLoader(scenes, batch_size=3, num_workers=2, multiprocessing_context="fork"))
    for part, name in enumerate(("images", "labels")):
        found, here = torch.cat([batch[part] for batch in loaded]), torch.stack([item[part] for item in scenes])
        assert torch.equal(found, here), name
