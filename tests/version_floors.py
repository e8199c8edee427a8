"""Checks that the version floors of pyproject.toml are true: ``make floors``, and a job of the public CI.

Three kinds of environments: each dependency at its floor beside the newest of the others that pip finds for it, all of
them at their floors, and all at their newest. In each the self-test is run, and the tests that touch what is old there.
torch is that of the environment the script is run in; wheels are tested on the oldest and newest of it elsewhere.

    python tests/version_floors.py [PACKAGE==VERSION …]    one environment with these in place of the floors
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
#: The tests that touch each dependency, of those that take seconds.
TESTS = {
    "numpy": ("tests/data", "tests/test_overlay.py"),
    "safetensors": ("tests/models/test_decouplecss_folder.py", "tests/one_pass/test_folders.py"),
    "peft": ("tests/one_pass/test_adapters.py", "tests/one_pass/test_folders.py", "tests/models/test_decouplecss.py"),
    "transformers": (
        *("tests/models/test_grounding_dino.py", "tests/models/test_class_detector.py", "tests/models/test_sam.py"),
        *("tests/models/test_convert_sam.py", "tests/models/test_phrases.py", "tests/models/test_preprocessing.py"),
        *("tests/models/test_decouplecss_folder.py", "tests/fuse/test_fuse.py", "tests/fuse/test_one_call.py"),
        "tests/fuse/test_fused_sam.py",
    ),
    "pillow": (
        "tests/data",
        "tests/commands/test_segment.py",
        "tests/commands/test_segment_picture_kinds.py",
        "tests/test_overlay.py",
    ),
    "torchmetrics": ("tests/data/test_continual_metrics.py", "tests/models/test_continual_evaluation.py"),
}
SUMMARY = re.compile(r"^\d+ (?:passed|failed|error|skipped|deselected).*", re.MULTILINE)


def requirements() -> dict[str, Requirement]:
    """Read the requirements of the package and of all its extras but the developers', by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = (*project["dependencies"], *extras["peft"], *extras["data"], *extras["commands"])
    wanted = {of.name: of for of in map(Requirement, lines)}
    return {name: of for name, of in wanted.items() if name not in ("torch", "fastcss")}


def cases(wanted: dict[str, Requirement]) -> Iterator[tuple[str, list[str]]]:
    """Name of each environment, and what is pinned in it."""
    floors = {name: next(iter(of.specifier)).version for name, of in wanted.items() if of.specifier}
    missing = TESTS.keys() - floors
    if missing:
        sys.exit(f"pyproject.toml has no floor for {', '.join(sorted(missing))}")
    pins = {name: f"{name}=={floors[name]}" for name in TESTS}
    for name, pin in pins.items():
        yield name, [pin]
    yield "all-floors", list(pins.values())
    yield "newest", []


def make(folder: Path, pins: list[str], wanted: dict[str, Requirement]) -> Path:
    """The Python of an environment that has the pinned versions over everything of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder], check=True)
    python = folder / "bin" / "python"
    path = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run([python, *path], check=True, capture_output=True, text=True).stdout.strip()
    beside = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(own) / "beside.pth").write_text(beside, encoding="utf-8")
    constraint = folder / "torch.txt"
    constraint.write_text(f"torch=={importlib.metadata.version('torch')}\n", encoding="utf-8")
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--constraint", constraint]
    newest = [] if pins else ["--upgrade"]
    subprocess.run([*command, *newest, *pins, *map(str, wanted.values())], check=True)
    return python


def run(python: Path, tests: list[str]) -> tuple[bool, str]:
    """Run the self-test and the tests there; return whether they pass, and what pytest says."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said, passed = [], True
    for which in (["--pyargs", "fastcss.selftest"], tests):
        done = subprocess.run(
            [python, "-m", "pytest", "-p", "no:cacheprovider", *which],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        passed = passed and done.returncode == 0
        lines = SUMMARY.findall(done.stdout)
        said.append(lines[-1] if lines else (done.stdout + done.stderr).strip().rpartition("\n")[2])
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    return passed, "; ".join(said)


def versions(python: Path) -> dict[str, str]:
    code = f"import importlib.metadata as m; print(*(m.version(name) for name in {list(TESTS)}))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(TESTS, found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pins", nargs="*", metavar="PACKAGE==VERSION")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "floors", help="of the environments")
    options = parser.parse_args()
    wanted, rows = requirements(), []
    for name, pins in [("given", options.pins)] if options.pins else cases(wanted):
        python = make(options.folder / name, pins, wanted)
        old = {Requirement(pin).name.lower() for pin in pins} or TESTS
        tests = list(dict.fromkeys(test for package in TESTS if package in old for test in TESTS[package]))
        passed, said = run(python, tests)
        rows.append([name, *versions(python).values(), "passes" if passed else "fails"])
        print(f"{name}: {said}", flush=True)
    head = ["at its floor", *TESTS, "tests"]
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)))
    if any(row[-1] != "passes" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
