"""Runs the configurations of PEFT's own tests through one_pass: ``python tests/peft_suite.py``.

They are those of ``tests/test_custom_models.py`` and ``tests/test_vision_models.py`` in the source distribution of the
PEFT that is installed, which pip downloads: every tuner, on the models that PEFT itself tests it with. Each is given as
many adapters as it names, or two, with random weights, and run live, with a route and from the folders that PEFT saves,
against PEFT switching from adapter to adapter. Nothing may be wrong: a configuration is exact, refused by a message of
one_pass, or PEFT itself cannot run it.

    python tests/peft_suite.py [--only TEXT] [--sources FOLDER]    configurations with TEXT in their name
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import importlib.metadata
import math
import subprocess
import sys
import tarfile
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import peft
import torch
import transformers
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import peft_outcomes  # noqa: E402

#: Packages that PEFT's test files import, and nothing that runs here calls.
NOT_CALLED = ("datasets", "diffusers")
#: The shape of a sample, where PEFT's input [9, 10] is not nine of them: its models of convolutions reshape it.
SAMPLES = {"Conv2d": (45,), "Conv2d1x1": (9,), "Conv2d2": (9, 10), "Conv3d": (5, 3, 3, 3)}
WAYS = {"live": "a call", "route": "`route=`", "folder": "from folders", "train": "gradients"}
KINDS = ("exact", "refused", "peft", "alike", "wrong")
#: Where the sources go that pip downloads.
SOURCES = ROOT / "build" / "peft-suite"


class Case(NamedTuple):
    name: str
    bare: Callable[[], nn.Module]
    configs: Callable[[], list[peft.PeftConfig]]
    given: dict[str, torch.Tensor]
    samples: dict[str, torch.Tensor]


def download(folder: Path) -> Path:
    """Return the folder of the tests of the installed PEFT's source distribution."""
    release = f"peft-{importlib.metadata.version('peft')}"
    if not (folder / release / "tests").is_dir():
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        options = ["--no-binary", "peft", "--no-build-isolation", "--dest", folder]
        subprocess.run([*command, *options, release.replace("-", "==")], check=True)
        with tarfile.open(folder / f"{release}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    if not (folder / release / "tests").is_dir():
        sys.exit(f"the source distribution of {release} holds no tests")
    return folder / release / "tests"


def imported(tests: Path, name: str) -> types.ModuleType:
    """Import one of PEFT's test files as a module of a package of another name than our own tests'."""
    for package in NOT_CALLED:
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
            continue
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__getattr__ = lambda _: None
    package = sys.modules.setdefault("tests_of_peft", types.ModuleType("tests_of_peft"))
    package.__path__ = [str(tests)]
    importlib.import_module("tests_of_peft.testing_utils").load_cat_image = lambda: None  # a download
    return importlib.import_module(f"tests_of_peft.{name}")


def cases(tests: Path) -> Iterator[Case]:
    custom, vision = imported(tests, "test_custom_models"), imported(tests, "test_vision_models")
    given = custom.TestPeftCustomModel().prepare_inputs_for_testing()

    def of(cls: type, *options: dict) -> Callable[[], list]:
        """Make a config of each options; AdaLoRA trains one adapter only, and takes others for inference."""
        options = [custom.set_init_weights_false(cls, each) for each in options]
        later = {"inference_mode": True} if cls is peft.AdaLoraConfig else {}
        return lambda: [cls(**copy.deepcopy(each) | (later if i else {})) for i, each in enumerate(options)]

    def copies(configs: list) -> Callable[[], list]:
        return lambda: copy.deepcopy(configs)

    for name, model, cls, options in custom.TEST_CASES:
        bare = functools.partial(custom.MockTransformerWrapper.from_pretrained, model)
        sample = SAMPLES.get(model, (10,))
        x = torch.arange(3 * math.prod(sample)).view(3, *sample)
        yield Case(name, bare, of(cls, options, options), given, {"X": x})
    several = custom.TestMultipleActiveAdapters()
    for name, tuner, cls, *options in custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES:
        bare = functools.partial(several.resolve_model_cls, tuner)
        yield Case(f"several: {name}", bare, of(cls, *options), given, {"X": given["X"][:3]})
    for name, *configs in _mixed_batches(custom):
        targets = {target for config in configs for target in config.target_modules}
        models = (custom.MLP, custom.ModelEmbConv1D, custom.ModelConv2D, custom.ModelMha)
        bare = next(model for model in models if targets <= dict(model().named_modules()).keys())
        x = torch.arange(135).view(3, 45) if bare is custom.ModelConv2D else given["X"][:3]
        yield Case(f"batches: {name}", bare, copies(configs), given, {"X": x})
    picture = {"pixel_values": torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))}
    for name, config in vision.CONFIGS.items():
        yield Case(f"vision: {name}", _resnet, copies([config] * 2), picture, picture)


def _mixed_batches(custom: types.ModuleType) -> Iterator[tuple]:
    """Yield name and configurations of PEFT's tests of batches with a sample for each of two adapters."""
    for test in vars(custom.TestMixedAdapterBatches).values():
        for mark in getattr(test, "pytestmark", ()):
            if mark.name == "parametrize" and mark.args[0] == "test_name, config0, config1":
                yield from mark.args[1]


def _resnet() -> nn.Module:
    """Build a ResNet of the kind and, about, the size of the one that PEFT's tests download."""
    config = transformers.ResNetConfig(
        embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def run(case: Case) -> dict[str, peft_outcomes.Outcome]:
    """Return what becomes of each way of running the case."""
    torch.manual_seed(0)
    bare = case.bare().eval()
    for seed in range(9):  # a few of the constrained rotations are the same for half of all draws
        try:
            model = peft_outcomes.adapted(bare, case.configs(), seed)
        except Exception as error:
            return {"live": peft_outcomes.Outcome("peft", peft_outcomes.first_line(error))}
        live = peft_outcomes.in_one_call(model, case.given)
        if live.kind != "alike":
            break
    with tempfile.TemporaryDirectory() as folder:
        return {
            "live": live,
            "route": peft_outcomes.with_a_route(model, case.samples),
            "folder": peft_outcomes.from_folders(bare, [model], case.given, Path(folder)),
            "train": peft_outcomes.in_training(model, case.given),
        }


def results(sources: Path, only: str = "") -> Iterator[tuple[Case, dict[str, peft_outcomes.Outcome]]]:
    """Run the configurations with ``only`` in their name."""
    sources.mkdir(parents=True, exist_ok=True)
    for case in cases(download(sources)):
        if only.lower() in case.name.lower():
            yield case, run(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="configurations with this in their name")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="where PEFT's sources go")
    options = parser.parse_args()
    counts: dict[str, Counter] = {way: Counter() for way in WAYS}
    for case, outcomes in results(options.sources, options.only):
        for way, outcome in outcomes.items():
            counts[way][outcome.kind] += 1
            if outcome.kind != "exact":
                print(f"{outcome.kind:7}  {way:6}  {case.name}: {outcome.said}", flush=True)
    print(f"\npeft {importlib.metadata.version('peft')}, {sum(counts['live'].values())} configurations")
    for way, found in counts.items():
        print(f"{way:6}", *(f"{kind} {found[kind]}" for kind in KINDS), sep="  ")
    sys.exit(any(found["wrong"] + found["alike"] for found in counts.values()))


if __name__ == "__main__":
    main()
