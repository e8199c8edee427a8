import math
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The inputs and the models are those of the ops' and the models' own tests.
sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("ops", "one_pass", "fuse")]

EXAMPLES = 30


@pytest.fixture(scope="session")
def fuzz(pytestconfig):
    """``fuzz(share)`` makes settings for that share of the examples; they are the same ones unless more are asked
    for."""
    asked = pytestconfig.getoption("--fuzz-examples")
    always = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    def share(part: float) -> settings:
        return settings(max_examples=math.ceil(part * (asked or EXAMPLES)), derandomize=asked is None, **always)

    return share
