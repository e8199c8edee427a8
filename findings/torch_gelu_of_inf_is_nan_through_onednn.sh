#!/usr/bin/env bash
# torch's exact GELU of inf is NaN on a CPU in float32 and bfloat16, and inf in a tensor of one element.
#
# GELU of two elements or more goes to oneDNN, which multiplies x by 1 + erf(x / √2) and halves last: inf beyond half of
# float32's largest value, and NaN for inf. One element, float64, and any size while oneDNN is switched off take torch's
# own loop, which halves first: inf stays inf, 3e38 stays 3e38. The tanh form and SiLU give inf everywhere. So a check of one
# value does not find why the activations of a whole layer became NaN where one of them was too large.
#
# Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
cat > "$folder/show.py" <<'PY'
import math
import sys

import torch
import torch.nn.functional as F

INF = float("inf")


def of(value, count, form=F.gelu, dtype=torch.float32):
    return form(torch.full((count,), value, dtype=dtype))[0].item()


print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
found = {
    "float32, 2 elements": (of(3e38, 2), of(INF, 2)),
    "bfloat16, 2 elements": (of(3e38, 2, dtype=torch.bfloat16), of(INF, 2, dtype=torch.bfloat16)),
    "float32, 1 element": (of(3e38, 1), of(INF, 1)),
    "float64, 2 elements": (of(3e38, 2, dtype=torch.float64), of(INF, 2, dtype=torch.float64)),
    "float32, 2 elements, tanh": (of(3e38, 2, lambda x: F.gelu(x, approximate="tanh")), None),
    "float32, 2 elements, silu": (of(3e38, 2, F.silu), of(INF, 2, F.silu)),
}
torch.backends.mkldnn.enabled = False
found["float32, 2 elements, without oneDNN"] = of(3e38, 2), of(INF, 2)
for name, (large, infinite) in found.items():
    print(f"{name:36} of 3e38: {large:g}" + ("" if infinite is None else f"  of inf: {infinite:g}"))
wrong = [name for name, (large, infinite) in found.items() if infinite is not None and math.isnan(infinite)]
overflows = [name for name, (large, _) in found.items() if math.isinf(large)]
both = ["float32, 2 elements", "bfloat16, 2 elements"]
sys.exit(not (wrong == both and "float32, 2 elements" in overflows and "float32, 1 element" not in overflows))
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py"
