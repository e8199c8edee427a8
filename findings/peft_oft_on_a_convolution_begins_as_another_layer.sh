#!/usr/bin/env bash
# PEFT's OFT on a convolution changes the layer before it is trained, and merging it changes the output again.
#
# An OFT adapter begins as the identity, and on a linear layer the model gives what it gave. On a Conv2d whose kernel is
# larger than 1x1 it does not: PEFT unfolds the input to overlapping patches, rotates these and folds them back, but with
# their axes in another order, and adding up what overlaps. So a pixel counts where it was not: one in the middle of an
# 8x8 picture reaches all over it. Merged, the same adapter is the identity that it should be. A picture of the kernel's
# own size, which has one patch, shows nothing of it.
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

import torch
from peft import OFTConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
print("torch", torch.__version__, "peft", importlib.metadata.version("peft"))
model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).eval()
fresh = get_peft_model(copy.deepcopy(model), OFTConfig(target_modules=["0"], oft_block_size=4)).eval()
merged = copy.deepcopy(fresh).merge_and_unload()
off = {}
with torch.no_grad():
    for side in (8, 3):
        x = torch.randn(1, 4, side, side)
        wanted = model(x)
        off[side] = (fresh(x) - wanted).abs().max().item(), (merged(x) - wanted).abs().max().item()
        print(f"picture {side}x{side}: outputs up to {wanted.abs().max():.1f},", end=" ")
        print(f"fresh adapter off by {off[side][0]:.1f}, merged by {off[side][1]:.1f}")
    x = torch.zeros(1, 4, 8, 8)
    x[:, :, 4, 4] = 1.0
    reached = [((of(x) - of(0 * x)).abs().amax(1) > 1e-6).sum().item() for of in (model, fresh, merged)]
    print("outputs that one pixel reaches: {} of the model, {} with the fresh adapter, {} merged".format(*reached))
sys.exit(not (off[8][0] > 1 and off[8][1] == 0.0 and off[3][0] < 1e-5 and reached[1] > reached[0] == reached[2]))
PY
"$folder/venv/bin/python" "$folder/show.py"
