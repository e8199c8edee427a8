#!/usr/bin/env bash
# A Triton kernel under TRITON_INTERPRET=1 cuts float32 off to bfloat16; compiled for a GPU it rounds to nearest.
#
# So a kernel's interpreted results in bfloat16 are off by up to a unit in the last place, always towards 0, and sums of
# them are biased. A test that compares them with torch's has to allow for that, or to round before the store.
#
# Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 triton==3.9.0 numpy
cat > "$folder/show.py" <<'PY'
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def to_bfloat16(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


x = torch.tensor([1.005859375, -1.005859375, 1.99609375, 1.0])
y = torch.empty(4, dtype=torch.bfloat16)
to_bfloat16[(1,)](x, y, 4)
print("triton", triton.__version__, "torch", torch.__version__)
print("float32:           ", x.tolist())
print("torch, to nearest: ", x.to(torch.bfloat16).tolist())
print("interpreted kernel:", y.tolist())
sys.exit(not (y.tolist() == [1.0, -1.0, 1.9921875, 1.0] and x.to(torch.bfloat16).tolist() == [1.0078125, -1.0078125, 2.0, 1.0]))
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py"
