"""Makes small runs on scenes of digits: tiny models with random weights, a vocabulary, a plan that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

from decouplecss_models import build
from transformers import BertTokenizer

from fastcss.data import CLASS_NAMES
from fastcss.models.continual_plan import Plan
from fastcss.models.continual_watch import Watch
from fastcss.models.decouplecss_folder import save_base
from fastcss.models.decouplecss_training import Recipe
from fastcss.models.phrases import ADJECTIVES

SETTINGS = {"threshold": 0.05, "length": 64, "prompts": 2, "hidden": 16, "rank": 2, "alpha": 2}
RECIPE = Recipe(epochs=2, batch_size=4, learning_rate=5e-3)
#: A run of two tasks for the command.
SMALL_DIGITS = (
    *("--data", "digits", "--setting", "5-5", "--epochs", "3", "--batch-size", "4"),
    *("--train-scenes", "12", "--test-scenes", "4"),
)
#: These fields differ between two runs of one plan.
TIMES = ("seconds",)


def save_models(folder: Path) -> Path:
    """Make a run without tasks: frozen models, and a tokenizer that knows all adjectives and most classes."""
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *ADJECTIVES]
    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    names = [word for data in ("digits", "voc") for name in CLASS_NAMES[data] for word in name.split()]
    vocabulary.write_text("\n".join(dict.fromkeys([*words, *names])), encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(vocabulary), model_max_length=32)
    vocabulary.unlink()
    save_base(build(()), folder, tokenizer=tokenizer)
    return folder


def plan_of(**fields) -> Plan:
    """Plan two tasks of few scenes."""
    given = {"data": "digits", "setting": "5-5", "train_scenes": 8, "test_scenes": 4, "shortest": 64, "longest": 64}
    return Plan(**given | {"recipe": RECIPE} | fields)


def lines(run: Path) -> list[dict]:
    """Read the lines of ``metrics.jsonl``, without the times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


class StopAt(Watch):
    """Stops a run, as Ctrl-C would, when it is told this for the n-th time."""

    def __init__(self, event: str, n: int = 1) -> None:
        def told(*_) -> None:
            nonlocal n
            n -= 1
            if n == 0:
                raise KeyboardInterrupt

        setattr(self, event, told)


def learned(run: Path) -> dict[str, bytes]:
    """Read every file of the tasks, byte for byte."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("task_*/*")}
