#!/usr/bin/env bash
# A LoRA adapter of PEFT inside torch.nn.TransformerEncoderLayer works in training and is off in evaluation.
#
# Where it may, torch runs the whole layer as one native call that is handed `linear1.weight`, `linear2.weight` and so on.
# PEFT's layers answer these names with the weights of the layer that they wrap, so the adapter that was trained plays no
# part once model.eval() is called. PEFT freezes these weights, so it is no matter whether gradients are enabled.
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
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
model = get_peft_model(encoder, LoraConfig(r=4, target_modules=["linear1", "linear2"], init_lora_weights=False))
x = torch.randn(2, 5, 16)


def effect():
    """What the adapter changes of the output: the largest difference from the model with the adapter turned off."""
    adapted = model(x)
    with model.disable_adapter():
        return (adapted - model(x)).abs().max().item()


print("torch", torch.__version__, "peft", importlib.metadata.version("peft"))
model.train()
training = effect()
model.eval()
evaluation = effect()
torch.backends.mha.set_fastpath_enabled(False)
unfused = effect()
print(f"the adapter moves the output by {training:.3f} in train(), {evaluation:.3f} in eval(), "
      f"{unfused:.3f} in eval() with torch.backends.mha.set_fastpath_enabled(False)")
sys.exit(not (training > 0.1 and evaluation == 0 and unfused > 0.1))
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py"

# Seen on 2026-11-30:
#
# torch 2.13.0+cpu peft 0.21.2
# the adapter moves the output by 1.243 in train(), 0.000 in eval(), 1.243 in eval() with torch.backends.mha.set_fastpath_enabled(False)
