#!/usr/bin/env bash
# After torch's newer setting for float32 convolutions nothing in the process can be exported any more.
#
# torch.backends.cudnn.conv.fp32_precision is what torch's notes tell to use in place of cudnn.allow_tf32. torch.export
# itself reads the older one on its way, which raises once the newer one was set, on a machine without a GPU as well, and
# for a model without a convolution.
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


def exported():
    """What torch.export says of a linear layer: its error, or "exports"."""
    try:
        torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    except Exception as error:
        return " ".join(str(error).split())[:400]
    return "exports"


print("torch", torch.__version__)
before = exported()
torch.backends.cudnn.conv.fp32_precision = "ieee"
after = exported()
print("before:", before)
print('after torch.backends.cudnn.conv.fp32_precision = "ieee":', after)
sys.exit(not (before == "exports" and after != "exports" and "allow_tf32" in after))
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py"
