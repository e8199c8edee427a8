"""``python -m benchmarks.coming_adapters [--quick] [--rounds N]``: what it costs that an adapter comes or goes.

The model is ViT-B with LoRA of rank 8 on query and value; six adapters run, and a seventh comes. Beside each change
stands what building a runner of seven takes. All are timed in turn, in CPU time of one thread, without Python's garbage
collector, whose passes would fall on one or the other by chance.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
import transformers

import fastcss

TASKS = 6
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def vit(quick: bool) -> torch.nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**(SMALL if quick else {}))).eval()


def adapted(bare: torch.nn.Module, tasks: int) -> peft.PeftModel:
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(bare), config, adapter_name="task0")
    for task in range(1, tasks):
        model.add_adapter(f"task{task}", config)
    return model.eval()


def measure(quick: bool, rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of CPU time of each thing that is done, in every round."""
    bare, times = vit(quick), {}

    def timed(what: str, do: Callable[[], object]) -> None:
        before = time.thread_time()
        do()
        times.setdefault(what, []).append(1e3 * (time.thread_time() - before))

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a folder that is written over
        model = adapted(bare, TASKS)
        adapted(bare, TASKS + 2).save_pretrained(folder)
        folders = [Path(folder, f"task{task}") for task in range(TASKS + 2)]
        of_model, of_folders = fastcss.one_pass(model), fastcss.one_pass.from_directories(bare, folders[:TASKS])
        gc.disable()
        try:
            for place in range(rounds):
                name = f"late{place}"
                model.load_adapter(folders[TASKS], name)
                timed("build for a PEFT model", lambda: fastcss.one_pass(model))
                timed("build for a PEFT model, add", lambda name=name: of_model.add(name))
                timed("build for a PEFT model, set_scale", lambda name=name: of_model.set_scale(name, 2.0))
                timed("build for a PEFT model, remove", lambda name=name: of_model.remove(name))
                model.delete_adapter(name)
                more = folders[: TASKS + 1]
                timed("build for folders", lambda more=more: fastcss.one_pass.from_directories(bare, more))
                timed("build for folders, add", lambda: of_folders.add(folders[TASKS]))
                timed("build for folders, set_scale", lambda: of_folders.set_scale(folders[TASKS].name, 2.0))
                timed("build for folders, swap", lambda: of_folders.swap(folders[TASKS].name, folders[TASKS + 1]))
                timed("build for folders, remove", lambda: of_folders.remove(folders[TASKS].name))
                gc.collect()
        finally:
            gc.enable()
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coming_adapters", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for what, times in measure(given.quick, given.rounds).items():
        median = statistics.median(times)
        if ", " not in what:
            built = median
            print(f"{what:26} {median:8.2f} ms   first {times[0]:.2f}")
        else:
            print(f"  {what.split(', ')[1]:24} {median:8.2f} ms   first {times[0]:.2f}   1/{built / median:.1f}")


if __name__ == "__main__":
    main()
