"""Writes docs/recipes.md, which says how each recipe of PEFT runs on each model: ``python docs/make_recipes.py``.

Every cell is a comparison with PEFT's own loop over the adapters, made anew each time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import peft
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs"), str(ROOT / "tests")]

import peft_outcomes  # noqa: E402
import peft_suite  # noqa: E402
from peft_outcomes import Outcome  # noqa: E402
from recipe_models import MODELS, Model, still  # noqa: E402

PAGE = ROOT / "docs" / "recipes.md"
#: What the page says of an outcome: of a kind, or of the engine of one that is exact.
SAID = {"vmap": "exact", "replay": "in turn", "exact": "exact", "refused": "refused", "peft": "not in PEFT"}
SAID |= {"alike": "WRONG", "wrong": "WRONG"}
INTRODUCTION = """\
# Recipes

What people save with PEFT, and how `one_pass` runs it. Every cell is a comparison with PEFT's own loop over the
adapters (`set_adapter`, then a call), on a small model of transformers' own class with random weights and two
adapters with random weights, in float32 on a CPU. Values are exact if no tensor is further than 1e-5 of its largest
value from PEFT's; a gradient may be twice as far from float64 as PEFT's own. `python docs/make_recipes.py` makes this
page anew; nothing in it is written by hand. This one is of {}.

- exact: in one pass, the tasks side by side. Adapters other than LoRA and DoRA run by PEFT's own layers, a task at a
  time, and the rest of the model does not.
- in turn: exact, the whole model a task after the other, what they share computed once, as what it does rules out
  `torch.vmap`.
- refused: `one_pass` raises the message below, and the model is as it was.
- not in PEFT: PEFT itself raises that, so that there is nothing to compare with.

The columns: a call for all adapters, in eval mode; a batch with an adapter for each sample and a sample without
(`route=`); from the folders of adapters that were trained alone (`one_pass.from_directories`); the gradients of every
adapter in training mode; what `torch.export` makes of the runner. The layers are the attention's `q_proj` and `v_proj`;
of ConvNeXt `pwconv1` and `pwconv2`, of SAM `qkv`."""
CONFIGURATIONS = """\
## PEFT's own tests

The configurations of PEFT's tests of custom models and of vision models, as its source distribution {} holds them,
on the models that PEFT tests them with: `python tests/peft_suite.py`. Each has two adapters of random weights, the two
that PEFT's test names or one twice. Gradients are those of eval mode, since PEFT's models drop at random. What is not
exact is listed below the table."""
WAYS = {
    "call": "a call",
    "route": "`route=`",
    "folders": "from folders",
    "train": "training",
    "export": "`torch.export`",
}

Make = Callable[[Model, int], peft.PeftConfig | None]


def lora(**options) -> Make:
    return lambda model, task: peft.LoraConfig(r=2 + task, lora_alpha=7, target_modules=model.targets, **options)


def head(model: Model, task: int) -> peft.PeftConfig:
    return lora(modules_to_save=model.head)(model, task)


def words(model: Model, task: int) -> peft.PeftConfig | None:
    return model.words and lora(trainable_token_indices={model.words: [3 + task, 5]})(model, task)


def of(config: type[peft.PeftConfig], **options) -> Make:
    return lambda model, _: config(target_modules=model.targets, **options)


def adalora(model: Model, task: int) -> peft.PeftConfig:
    """Make the adapter of a task; PEFT trains one of them only, and takes others for inference."""
    options = {"init_r": 3, "target_r": 2, "total_step": 10, "inference_mode": task > 0}
    return peft.AdaLoraConfig(target_modules=model.targets, **options)


RECIPES: dict[str, Make] = {
    "LoRA": lora(),
    "LoRA, head saved whole": head,
    "LoRA, all linear layers": lambda _, task: peft.LoraConfig(r=2 + task, lora_alpha=1, target_modules="all-linear"),
    "LoRA, biases": lora(bias="lora_only"),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "LoRA, trainable tokens": words,
    "AdaLoRA": adalora,
    "LoHa": of(peft.LoHaConfig, r=2),
    "LoKr": of(peft.LoKrConfig, r=2),
    "VeRA": of(peft.VeraConfig, r=4),
    "IA3": of(peft.IA3Config, feedforward_modules=[]),
    "OFT": of(peft.OFTConfig, oft_block_size=4),
}


def outcomes(model: str, recipe: str) -> dict[str, Outcome] | None:
    """Run two adapters in every way; return None if the model has not what the recipe adapts."""
    about = MODELS[model]
    configs = [RECIPES[recipe](about, task) for task in range(2)]
    if None in configs:
        return None
    torch.manual_seed(0)
    bare, given = still(about.build()), dict(about.given)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        try:  # each adapter trained alone, as a recipe has it
            alone = [peft_outcomes.adapted(bare, [config], seed=task) for task, config in enumerate(configs)]
            found["folders"] = peft_outcomes.from_folders(bare, alone, given, Path(folder))
            model = peft_outcomes.adapted(bare, configs)
        except Exception as error:
            return dict.fromkeys(WAYS, Outcome("peft", peft_outcomes.first_line(error))) | found
    return found | {
        "call": peft_outcomes.in_one_call(model, given),
        "route": peft_outcomes.with_a_route(model, given),
        "train": peft_outcomes.in_training(model.train(), given),
        "export": peft_outcomes.exported(model.eval(), given),
    }


def row(model: str, recipe: str) -> dict[str, Outcome] | None:
    """Return the outcomes of a row in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return outcomes(model, recipe)


def line(name: str, cells: Iterable[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def cell(outcome: Outcome, notes: list[str]) -> str:
    """Return what the table says of an outcome; the message behind it goes to ``notes``."""
    if outcome.kind == "exact":
        return SAID[outcome.said]
    said = quoted(outcome)
    if said not in notes:
        notes.append(said)
    return f"{SAID[outcome.kind]}[^{1 + notes.index(said)}]"


def quoted(outcome: Outcome) -> str:
    return f"`{outcome.said.replace('`', chr(39))}`"


def recipes(processes: int) -> Iterator[str]:
    """Yield the part of the page with a table for each model."""
    notes: list[str] = []
    pairs = [(model, recipe) for model in MODELS for recipe in RECIPES]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        found = dict(zip(pairs, pool.map(row, *zip(*pairs, strict=True)), strict=True))
    for model in MODELS:
        yield f"## {model}"
        rows = [(recipe, found[model, recipe]) for recipe in RECIPES if found[model, recipe]]
        lines = [line(recipe, (cell(of[way], notes) for way in WAYS)) for recipe, of in rows]
        yield "\n".join([line("adapters", WAYS.values()), line("---", ["---"] * len(WAYS)), *lines])
    yield "\n".join(f"[^{i}]: {note}" for i, note in enumerate(notes, 1))


def configurations(sources: Path) -> Iterator[str]:
    """Yield the part of the page on PEFT's own configurations."""
    counts: dict[str, Counter] = {}
    notes: dict[str, list[str]] = {}
    for case, found in peft_suite.results(sources):
        tuner = case.configs()[0].peft_type.value
        counts.setdefault(tuner, Counter())["all"] += 1
        for way, outcome in found.items():
            counts[tuner][way, outcome.kind] += 1
            if outcome.kind != "exact":
                notes.setdefault(f"{SAID[outcome.kind]}, {quoted(outcome)}", []).append(
                    f"{case.name} ({peft_suite.WAYS[way]})"
                )
    rows = []
    for tuner, of in sorted(counts.items()):
        cells = [
            ", ".join(f"{of[way, k]} {SAID[k]}" for k in peft_suite.KINDS if of[way, k]) for way in peft_suite.WAYS
        ]
        rows.append(line(tuner, [str(of["all"]), *cells]))
    yield "\n".join([line("tuner", ["configurations", *peft_suite.WAYS.values()]), line("---", ["---"] * 5), *rows])
    yield "\n".join(f"- {said}: {'; '.join(names)}" for said, names in notes.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--sources", type=Path, default=peft_suite.SOURCES, help="where PEFT's sources go")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("peft", "transformers", "torch"))
    parts = [INTRODUCTION.format(versions), *recipes(options.processes)]
    parts += [CONFIGURATIONS.format(importlib.metadata.version("peft")), *configurations(options.sources)]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if SAID["wrong"] in PAGE.read_text(encoding="utf-8"):
        sys.exit(f"{PAGE.relative_to(ROOT)} has cells that are {SAID['wrong']}")


if __name__ == "__main__":
    main()
