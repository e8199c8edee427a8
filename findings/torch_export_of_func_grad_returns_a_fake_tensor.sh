#!/usr/bin/env bash
# torch.export takes a module that calls torch.func.grad, and the exported program returns a FakeTensor.
#
# The export passes without a warning. In its graph the tensor that is differentiated is no input but a constant of the
# trace, so the program does not read its argument, and what it returns has a shape and no values.
#
# Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
cat > "$folder/show.py" <<'PY'
import sys

import torch


class Gradient(torch.nn.Module):
    def forward(self, x):
        return torch.func.grad(lambda t: (t**3).sum())(x)


x = torch.tensor([1.0, 2.0, 3.0])
program = torch.export.export(Gradient(), (torch.randn(3),)).module()
eager, exported = Gradient()(x), program(x)
print("torch", torch.__version__)
print("eager:   ", type(eager).__name__, eager.tolist())
print("exported:", type(exported).__name__, tuple(exported.shape))
sys.exit(not (eager.tolist() == [3.0, 12.0, 27.0] and type(exported).__name__ == "FakeTensor"))
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py"
