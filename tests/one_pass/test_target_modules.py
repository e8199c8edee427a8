"""The rule by which a LoraConfig names layers, against PEFT's own."""

from __future__ import annotations

import itertools

import peft
import pytest
import transformers
from adapted_models import gpt2, vit
from peft.tuners.tuners_utils import check_target_module_exists

from fastcss._one_pass.target_modules import targeted

WANTED = (
    *(["q_proj", "fc1"], ["layers.1.mlp.fc2", "o_proj"], r".*\.1\..*(q_proj|fc2)", r"q_proj", ["0", "projection"]),
    ["proj", "c1", "fc2"],  # the ends of names are none, but whole parts
)
EXCLUDED = (None, ["q_proj"], ["layers.0.mlp.fc1", "projection"], r"layers\.0\..*", [])
INDICES = (None, [], [1], 0, [0, 5])
PATTERNS = (None, "layers", ["blocks", "layers"], "h", [])


def test_a_config_names_the_layers_that_peft_adapts():
    model = vit()
    names = [name for name, _ in model.named_modules() if name]
    seen = set()
    for wanted, excluded, indices, pattern in itertools.product(WANTED, EXCLUDED, INDICES, PATTERNS):
        if isinstance(wanted, str) and (indices is not None or pattern is not None):
            continue  # PEFT allows these with lists only
        options = {
            "target_modules": wanted, "exclude_modules": excluded, "layers_to_transform": indices,
            "layers_pattern": pattern if indices else None,
        }  # fmt: skip
        config = peft.LoraConfig(**options)
        expected = [name for name in names if check_target_module_exists(config, name)]
        assert targeted(options, model) == expected, options
        seen.add(tuple(expected))
    assert len(seen) > 12


@pytest.mark.parametrize("head", [None, "language model", "SEQ_CLS"])
def test_all_linear_layers(head):
    config = gpt2().config
    config.pad_token_id = 0
    kind = {"language model": transformers.GPT2LMHeadModel, "SEQ_CLS": transformers.GPT2ForSequenceClassification}
    model = kind.get(head, transformers.GPT2Model)(config)
    options = {"target_modules": "all-linear", "task_type": head if head == "SEQ_CLS" else None}
    expected = targeted(options, model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).get_base_model()
    assert sorted(expected) == sorted(name for name, module in adapted.named_modules() if hasattr(module, "lora_A"))


def test_a_config_that_leaves_the_layers_to_peft():
    assert targeted({"target_modules": None}, vit()) is None
