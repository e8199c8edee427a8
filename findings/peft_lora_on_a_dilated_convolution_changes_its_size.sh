#!/usr/bin/env bash
# PEFT's LoRA on a dilated convolution leaves the dilation out, and where shapes allow it the output gets another size.
#
# lora_A is a convolution with the layer's kernel size, stride and padding, but with dilation 1: its output is larger
# than the layer's. Mostly the sum of both fails. Where the layer gives a single pixel it broadcasts: 1×1 becomes 7×7,
# without a word, and even though a new adapter adds nothing but zeros.
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


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, kernel_size=3, dilation=4)

    def forward(self, x):
        return self.conv(x)


def shapes(side):
    """Of what the model gives for a square picture, bare and with an adapter that is still zero; an error's text."""
    model, x = Model(), torch.randn(1, 4, side, side)
    bare = tuple(model(x).shape)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["conv"]))
    try:
        return bare, tuple(adapted(x).shape)
    except RuntimeError as error:
        return bare, str(error)


print("torch", torch.__version__, "peft", importlib.metadata.version("peft"))
small, large = shapes(9), shapes(16)
print("9×9:   bare", small[0], "with LoRA", small[1])
print("16×16: bare", large[0], "with LoRA", large[1])
as_seen = small == ((1, 6, 1, 1), (1, 6, 7, 7)) and large[0] == (1, 6, 8, 8) and "must match" in large[1]
sys.exit(not as_seen)
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py"
