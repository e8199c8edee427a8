#!/usr/bin/env bash
# PEFT's ensure_weight_tying adapts a language model's tied embedding and head for the first adapter only.
#
# With the embedding and the head among the target modules, and one weight in both, the first LoRA adapter of a model gets
# weights in both layers that are tied as the base weights are. The same config added as a second adapter gets weights in
# the embedding alone; no warning tells, and training or saving it goes on without its half. Alone in a fresh model the
# second adapter has both.
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
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 20, "n_positions": 16}
SIZES |= {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}


def model():
    return GPT2LMHeadModel(GPT2Config(**SIZES))


def config():
    return LoraConfig(r=2, target_modules=["wte", "lm_head"], ensure_weight_tying=True, init_lora_weights=False)


def layers(peft_model, adapter):
    names = [name for name, _ in peft_model.named_parameters(remove_duplicate=False) if f".{adapter}" in name]
    return sorted({name.split(".lora")[0].rsplit(".", 1)[-1] for name in names})


print("torch", torch.__version__, "peft", importlib.metadata.version("peft"), end=" ")
print("transformers", importlib.metadata.version("transformers"))
both = get_peft_model(model(), config(), adapter_name="first")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    both.add_adapter("second", config())
alone = get_peft_model(model(), config(), adapter_name="second")
found = layers(both, "first"), layers(both, "second"), layers(alone, "second")
print("layers of the first adapter:           ", *found[0])
print("layers of the second, added to it:     ", *found[1])
print("layers of the second in a fresh model: ", *found[2])
print("warnings as it was added:", [str(w.message)[:80] for w in said])
sys.exit(found != (["lm_head", "wte"], ["wte"], ["lm_head", "wte"]) or bool(said))
PY
"$folder/venv/bin/python" "$folder/show.py"
