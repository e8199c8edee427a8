"""Tests what is built: without a usable compiler, with the project's address, by the tools of one release each."""

from __future__ import annotations

import os
import re
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
    compiler.write_text("#!/bin/sh\necho 'instruction_set.h:5: error: this compiler is too old' >&2\nexit 1\n")
    compiler.chmod(0o755)
    environment |= {"CXX": str(compiler), "CC": str(compiler)}
    done = subprocess.run([*program, *folders], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "THE COMPILED CPU KERNELS WERE NOT BUILT" in done.stderr
    said = f"{compiler} says instruction_set.h:5: error: this compiler is too old"
    assert said in done.stderr
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "lib" / "fastcss" / "_dispatch" / "backends.py"))
    assert backends._load("_cpu") == f"_cpu.abi3.so was not built with this installation: {said}"


def test_metadata_have_the_address_that_the_build_was_given_and_no_other(tmp_path):
    wanted = {
        "": [],
        "https://forge.example/someone/fastcss/": [
            "Changelog, https://forge.example/someone/fastcss/blob/HEAD/CHANGELOG.md",
            "Documentation, https://forge.example/someone/fastcss/blob/HEAD/docs",
            "Source, https://forge.example/someone/fastcss",
            "Issues, https://forge.example/someone/fastcss/issues",
        ],
    }
    for given, urls in wanted.items():
        folder = tmp_path / str(len(urls))
        folder.mkdir()
        command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"FASTCSS_URL": given})
        metadata = (folder / "fastcss.egg-info" / "PKG-INFO").read_text(encoding="utf-8")
        assert re.findall("^Project-URL: (.*)", metadata, re.MULTILINE) == urls
        assert "Requires-Dist: pytest;" in metadata  # of an extra
        assert not re.search("^Requires-Dist: pytest$", metadata, re.MULTILINE)


def test_hooks_have_the_releases_of_make_lint():
    project, hooks = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", ".pre-commit-config.yaml")
    )
    pins = dict(re.findall(r"\[((?:ruff|clang-format))==([\d.]+)\]", hooks))
    assert pins.keys() == {"ruff", "clang-format"}
    for tool, release in pins.items():
        assert f'"{tool}=={release}"' in project
