#!/usr/bin/env bash
# PEFT saves an adapter named "0", "1" or "2" without most of its layers, where the model numbers its layers too.
#
# The name of an adapter is looked for in every key of its weights, between dots, and "layers.0.proj" has "0" there: of an
# adapter called "0" only layer 0 is written, of "1" only layer 1. Nothing is said, and what is loaded again is another
# adapter. With names that are no parts of module names ("task0") all layers are saved.
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
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))


def saved_layers(names):
    """Adapter name → the layers that its saved file has weights for."""
    model = None
    for name in names:
        config = LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
        if model is None:
            model = get_peft_model(Model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        keys = {name: load_file(f"{folder}/{name}/adapter_model.safetensors") for name in names}
    return {name: sorted({int(key.split(".layers.")[1][0]) for key in of}) for name, of in keys.items()}


print("torch", torch.__version__, "peft", importlib.metadata.version("peft"))
numbers, words = saved_layers(["0", "1", "2"]), saved_layers(["task0", "task1", "task2"])
print("adapters 0, 1, 2            → layers saved:", numbers)
print("adapters task0, task1, task2 → layers saved:", words)
as_seen = numbers == {"0": [0], "1": [1], "2": [2]} and all(layers == [0, 1, 2] for layers in words.values())
sys.exit(not as_seen)
PY
"$folder/venv/bin/python" "$folder/show.py"

# Seen on 2026-11-30:
#
# torch 2.13.0+cpu peft 0.21.2
# adapters 0, 1, 2            → layers saved: {'0': [0], '1': [1], '2': [2]}
# adapters task0, task1, task2 → layers saved: {'task0': [0, 1, 2], 'task1': [0, 1, 2], 'task2': [0, 1, 2]}
