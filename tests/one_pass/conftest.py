"""Sets up every test of the runner."""

import copy
import shutil

import pytest
import torch
from adapted_models import COMING, adapt, save, vit
from pool_models import Saved


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


@pytest.fixture
def four(tmp_path):
    """Makes (bare model, PEFT model with task0 … task3, their folders); the adapters cover the same layers."""
    torch.manual_seed(0)
    bare = vit()
    configs = [{"r": r, "target_modules": COMING, "lora_bias": r == 5, "use_rslora": r == 2} for r in (4, 5, 3, 2)]
    model = adapt(copy.deepcopy(bare), *configs)
    return bare.eval(), model, save(model, tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def copied(kept, tmp_path):
    """The same with folders of its own, to be changed."""
    mine = copy.copy(kept)
    mine.folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in kept.folders]
    return mine
