#!/usr/bin/env bash
# PEFT's adapter of the fast PiSSA (pissa_niter_4, …) is another one when it is loaded than when it was saved.
#
# PiSSA begins with the largest singular vectors of a layer's weight in the adapter, and takes them out of the weight.
# The folder holds the adapter alone, and PEFT takes them out anew when it loads it. The exact decomposition (pissa) is
# the same each time; the fast one is of random projections, so that another part is taken out than was in training. The
# model gives other values than the trained one did, and no warning tells. How far they are off depends on the weight:
# here its singular values lie close together.
#
# Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 peft==0.21.2
cat > "$folder/show.py" <<'PY'
import copy
import importlib.metadata
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

torch.manual_seed(0)
print("torch", torch.__version__, "peft", importlib.metadata.version("peft"))
model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(4, 64)


def errors(init):
    """Save an adapter after a step of training; return how far three loads of it are off, of the largest output."""
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=init)
    trained = get_peft_model(copy.deepcopy(model), config)
    trained(x).square().mean().backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    trained.eval()
    found = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        trained.save_pretrained(folder)
        for _ in range(3):
            loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
            found.append(((loaded(x) - trained(x)).abs().max() / trained(x).abs().max()).item())
    return found


found = {init: errors(init) for init in ("pissa", "pissa_niter_4", "pissa_niter_16")}
for init, off in found.items():
    print(f"{init:15} three loads are off by", *(f"{100 * error:.1f}%" for error in off))
exact, *fast = found.values()
sys.exit(max(exact) > 1e-5 or min(map(min, fast)) < 0.01)
PY
"$folder/venv/bin/python" "$folder/show.py"
