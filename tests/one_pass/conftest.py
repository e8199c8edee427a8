"""Sets up every test of the runner."""

import copy

import pytest
import torch
from adapted_models import adapt, save, vit


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The models are tiny: threads would cost more than they give."""


@pytest.fixture
def saved(tmp_path):
    """Makes (bare model, PEFT model, folders) of a small ViT whose adapters differ in everything."""
    torch.manual_seed(0)
    bare = vit()
    model = adapt(
        copy.deepcopy(bare),
        {"r": 2, "target_modules": ["q_proj", "projection"]},
        {"r": 5, "target_modules": ["fc1"], "use_rslora": True, "lora_bias": True},
        {"r": 3, "target_modules": ["q_proj", "fc2"], "alpha_pattern": {"layers.1.attention.q_proj": 9}},
    )
    return bare.eval(), model, save(model, tmp_path)
