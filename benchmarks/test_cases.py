"""``pytest benchmarks``: verifies our provider in every case of the registry, and times it by pytest-benchmark.

``pytest benchmarks --benchmark-autosave`` keeps the times, and ``pytest benchmarks --benchmark-compare
--benchmark-compare-fail=median:20%`` fails where they grew. These are absolute times, which only a machine of one's own
can repeat; ``python -m benchmarks --compare OLD.jsonl`` compares with peers of the same run instead. ``--quick`` takes
the small stand-in cases, ``-k`` a part of them.
"""

import pytest
import torch

from benchmarks import harness, registry
from benchmarks.cases import OURS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    cases = registry.all_cases(DEVICE, metafunc.config.getoption("--quick"))
    points = [pytest.param(case, mode, id=f"{case.name}-{mode}") for case in cases for mode in case.modes]
    metafunc.parametrize(("case", "mode"), points)


def test_fastcss(benchmark, case, mode):
    torch.manual_seed(0)
    problem = case.build(DEVICE, mode)
    ours = {OURS: problem.providers[OURS]}
    steps, _, remarks = harness.verify(ours, problem.expected(), problem)
    assert not remarks

    def step():
        steps[OURS]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info |= case.shape
    benchmark(step)
