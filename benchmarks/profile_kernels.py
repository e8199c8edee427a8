"""``ncu --profile-from-start off … python -m benchmarks.profile_kernels CASE…``: runs our kernels under Nsight Compute.

Each kernel of these cases is launched once while the profiler counts, after calls that compile and choose.
"""

from __future__ import annotations

import argparse
import sys

import torch

from . import registry

KERNELS = ("triton", "cuda")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="+", help="run the cases whose name starts so, in their last mode")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    for case in registry.select(registry.all_cases("cuda"), names=options.case):
        torch.manual_seed(0)
        problem = case.build("cuda", case.modes[-1])
        for name in KERNELS:
            if name in problem.providers:
                step = problem.providers[name]()
                step()
                torch.cuda.synchronize()
                print(f"{case.name} {case.modes[-1]}: {name}", flush=True)
                with torch.cuda.profiler.profile():
                    step()
    return 0


if __name__ == "__main__":
    sys.exit(main())
