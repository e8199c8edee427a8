"""Ops in the children of a process that has used them, forked or spawned: the same bits, and none waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from calls import runs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("kind", ["os.fork", "fork", "spawn"])
def test_children(kind):
    """Ops must work in children that are forked by hand, and in workers of a DataLoader."""
    runs("cpu", "cpu")
    program = [sys.executable, Path(__file__).with_name("children.py"), kind]
    # Waiting threads would take the processors from other tests by default.
    subprocess.run(program, check=True, timeout=300, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
