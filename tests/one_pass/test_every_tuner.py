"""Tests a config of every tuner of the installed PEFT, live, routed, from folders and in training. PEFT's own 432 are
run by tests/peft_suite.py."""

from __future__ import annotations

import peft
import peft_outcomes
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

# These work around the model's layers, or call the model in a way of their own; they want a language model.
AROUND = {"ADAPTION_PROMPT", "CARTRIDGE", "POLY", "SHADOW", "XLORA"}
# What a tuner needs beside its target modules, to fit the model below.
OPTIONS = {
    "ADALORA": {"total_step": 10, "init_r": 3, "target_r": 2},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["first"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "LORA": {"use_dora": True},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 2},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["words"], "token_indices": [1, 3]},
    "UNILORA": {"theta_d_length": 32},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 10},
}
TUNERS = {getattr(kind, "value", kind): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
TUNERS = {
    kind: config
    for kind, config in TUNERS.items()
    if kind not in AROUND and not issubclass(config, peft.PromptLearningConfig)
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.first, self.norm = nn.Embedding(5, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.last = nn.Linear(16, 4)

    def forward(self, words):
        return self.last(torch.tanh(self.norm(self.first(self.words(words)))))


@pytest.mark.parametrize("kind", TUNERS)
@pytest.mark.filterwarnings("ignore")
def test_a_tuner_runs_as_in_peft(kind, tmp_path):
    options = {"target_modules": ["first"], **OPTIONS.get(kind, {})}
    later = {"inference_mode": True} if kind == "ADALORA" else {}  # PEFT trains one of its adapters only
    bare, given = Model().eval(), {"words": torch.tensor([[1, 2, 3], [3, 4, 0], [0, 1, 1]])}
    model = peft_outcomes.adapted(bare, [TUNERS[kind](**options), TUNERS[kind](**options, **later)])
    outcomes = {
        "live": peft_outcomes.in_one_call(model, given),
        "route": peft_outcomes.with_a_route(model, given),
        "folder": peft_outcomes.from_folders(bare, [model], given, tmp_path),
        "train": peft_outcomes.in_training(model, given),
    }
    assert {way: outcome.kind for way, outcome in outcomes.items()} == dict.fromkeys(outcomes, "exact"), outcomes
