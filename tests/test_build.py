"""An installation without a compiler that will do: it works, and says what the compiler said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastcss._dispatch import backends

ROOT = Path(__file__).parents[1]


def test_what_the_compiler_said_is_kept_and_told(tmp_path, monkeypatch):
    if not (ROOT / "setup.py").exists():
        pytest.skip("installed without setup.py")
    pytest.importorskip("setuptools")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTCSS_")}
    program = [sys.executable, "setup.py", "-q", "build_ext"]
    folders = ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'pack.h:9: error: this compiler is too old' >&2\nexit 1\n")
    compiler.chmod(0o755)
    environment |= {"CXX": str(compiler), "CC": str(compiler)}
    done = subprocess.run([*program, *folders], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "THE COMPILED CPU KERNELS WERE NOT BUILT" in done.stderr
    said = f"{compiler} says pack.h:9: error: this compiler is too old"
    assert said in done.stderr
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "lib" / "fastcss" / "_dispatch" / "backends.py"))
    assert backends._load("_cpu") == f"_cpu.abi3.so was not built with this installation: {said}"
