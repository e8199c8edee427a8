#!/usr/bin/env bash
# PEFT's second TinyLoRA adapter on a transformers Conv1D is made of the transposed weight.
#
# A Conv1D keeps its weight as [in, out], and PEFT notes that in the config (fan_in_fan_out) when it makes the layer,
# with the first adapter. The second one's config still says False, and its frozen A and B are the singular vectors of the
# weight as it lies. On a layer of as many outputs as inputs (GPT-2's c_proj) nothing tells: the adapter has another A
# than alone in a fresh model. On another one (c_attn) the first call with it fails.
#
# Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 peft==0.21.2 transformers==5.24.0
cat > "$folder/show.py" <<'PY'
import importlib.metadata
import sys

import torch
from peft import TinyLoraConfig, get_peft_model
from transformers import GPT2Config, GPT2Model

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 20, "n_positions": 16, "use_cache": False}


def model(target, *adapters):
    """Make the same GPT-2 each time, with TinyLoRA on one of its layers."""
    torch.manual_seed(0)
    made = GPT2Model(GPT2Config(**SIZES, bos_token_id=None, eos_token_id=None))
    for adapter in adapters:
        config = TinyLoraConfig(target_modules=[target], r=2, u=4)
        if adapter == adapters[0]:
            made = get_peft_model(made, config, adapter_name=adapter)
        else:
            made.add_adapter(adapter, config)
    made.set_adapter(adapters[-1])
    return made.eval()


def a(made):
    (layer,) = (module for module in made.modules() if hasattr(module, "tinylora_A"))
    return layer.tinylora_A["second"]


print("torch", torch.__version__, "peft", importlib.metadata.version("peft"), end=" ")
print("transformers", importlib.metadata.version("transformers"))
alone, added = a(model("attn.c_proj", "second")), a(model("attn.c_proj", "first", "second"))
print("c_proj, 8 to 8: A of the second adapter alone", list(alone.shape), "and as the second", list(added.shape), end="")
print(f", which differ by up to {(alone - added).abs().max():.2f} of {alone.abs().max():.2f}")
words, failed = torch.tensor([[1, 2, 3]]), ""
model("attn.c_attn", "second")(words)
try:
    model("attn.c_attn", "first", "second")(words)
except RuntimeError as error:
    failed = str(error)
print("c_attn, 8 to 24: alone it runs, as the second:", failed or "it runs")
sys.exit(torch.allclose(alone.abs(), added.abs(), atol=0.01) or "cannot be multiplied" not in failed)
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py"
