"""``python -m benchmarks.verify CASE… [--device cpu|cuda] [--quick]``: runs each provider of these cases once, untimed.

It says which of them do not run or are wrong, and leaves all that is compiled for them in the compilers' caches. Exit
code 1: one of ours did not run or was wrong.
"""

from __future__ import annotations

import argparse
import functools
import sys

import torch

from . import harness, registry
from .cases import OURS, Case

OF_THE_PACKAGE = (OURS, "composed", "triton", "cuda")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="+", help="run the cases whose name starts so")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    options = parser.parse_args(arguments)
    cases = registry.select(registry.all_cases(options.device, options.quick), names=options.case)
    ours = False
    for case in cases:
        for mode in case.modes:
            for provider, remark in remarks(case, mode, options.device).items():
                print(f"{case.name} {mode}: {provider}: {remark}", flush=True)
                ours |= provider.removesuffix("+graph") in OF_THE_PACKAGE
    return 1 if ours else 0


def remarks(case: Case, mode: str, device: str) -> dict[str, str]:
    """Return what is wrong, by provider; a GPU also runs each provider as a CUDA graph."""
    torch.manual_seed(0)
    torch.compiler.reset()
    problem = case.build(device, mode)
    expected = problem.expected()
    steps, _, found = harness.verify(problem.providers, expected, problem)
    if device == "cuda":
        graphs = {f"{name}+graph": functools.partial(problem.capture, name, step) for name, step in steps.items()}
        found |= harness.verify(graphs, expected, problem)[2]
    return found


if __name__ == "__main__":
    sys.exit(main())
