"""Plans a continual run: which classes it learns when, from what data, by which method and recipe."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import NamedTuple

from torch.utils.data import Dataset

from ..data import ADE20K, CLASS_NAMES, VOC, DigitScenes
from ..data import tasks as tasks_of
from .decouplecss_training import Recipe
from .phrases import describe

METHODS = ("decouplecss", "naive", "joint")


class Defaults(NamedTuple):
    """Holds the defaults with which a data set is learned.

    Attributes:
        settings: settings of ``DecoupleCSS`` that the base does not bring.
        plan: fields of ``Plan``.
    """

    settings: dict
    plan: dict


#: The paper's values, as far as it gives them; those of the digits are this project's own.
DEFAULTS = {
    "digits": Defaults(
        {
            "threshold": 0.3,
            "length": 1024,
            "prompts": 6,
            "hidden": 32,
            "rank": 8,
            "alpha": 16,
            "presence": "all",
            "confidence": "presence",
        },
        {
            "recipe": Recipe(epochs=2, batch_size=16, learning_rate=3e-3, clip=1.0, token_weight=1.0),
            "shortest": 64,
            "longest": 64,
            "train_scenes": 10_000,
            "test_scenes": 300,
        },
    ),
    "voc": Defaults(
        {
            "threshold": 0.3,
            "length": 512,
            "prompts": 6,
            "hidden": 1024,
            "rank": 32,
            "alpha": 32,
            "presence": "all",
            "confidence": "sam",
        },
        {
            "recipe": Recipe(epochs=5, batch_size=24, learning_rate=1e-4),
            "shortest": 800,
            "longest": 1333,
            "train_split": "train_aug",
        },
    ),
    "ade": Defaults(
        {
            "threshold": 0.2,
            "length": 1024,
            "prompts": 6,
            "hidden": 1024,
            "rank": 32,
            "alpha": 32,
            "presence": "all",
            "confidence": "sam",
        },
        {"recipe": Recipe(epochs=20, batch_size=24, learning_rate=1e-4), "shortest": 800, "longest": 1333},
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds all that the outcome of a run depends on, beside the frozen models and the model's settings.

    Attributes:
        data: "digits", "voc" or "ade".
        setting: "first-step", see ``fastcss.data.tasks``.
        method: "decouplecss", each task with an adapter of its own; "naive", one adapter for all tasks, fine-tuned
            from task to task; "joint", all classes at once from all the data, in one task.
        root: folder of the data, None for the digits.
        train_split: "train", or for VOC "train_aug".
        train_scenes, test_scenes: numbers of the digits' scenes; None for other data.
        seed: seed of the digits' scenes, of the initial values of what is trained, and of the order of the pictures.
        shortest, longest: sides of the detector's pictures, see ``preprocess``.
        recipe: how each task is learned; its seed stays 0, since the plan's seed decides.
        phrases: the user's own phrases for every class, in place of those of ``fastcss.models.phrases``.

    Raises:
        ValueError: a field has no valid value; the message names it.
    """

    data: str
    setting: str
    _: dataclasses.KW_ONLY
    method: str = "decouplecss"
    root: str | None = None
    train_split: str = "train"
    train_scenes: int | None = None
    test_scenes: int | None = None
    seed: int = 0
    shortest: int = 800
    longest: int = 1333
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    phrases: dict[str, list[str]] | None = None

    def __post_init__(self) -> None:
        tasks_of(self.data, self.setting)
        if self.method not in METHODS:
            raise ValueError(f"Plan: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        digits = self.data == "digits"
        if digits != (self.root is None):
            raise ValueError(f"Plan: root must be {'None' if digits else 'a folder'} for {self.data}, got {self.root}")
        splits = ("train", "train_aug") if self.data == "voc" else ("train",)
        if self.train_split not in splits:
            raise ValueError(f"Plan: train_split must be {' or '.join(splits)}, got {self.train_split!r}")
        for name in ("train_scenes", "test_scenes"):
            count = getattr(self, name)
            if digits != (count is not None) or (digits and count < 1):
                raise ValueError(f"Plan: {name} must be {'at least 1' if digits else 'None'}, got {count}")
        for name, least in (("seed", 0), ("shortest", 1), ("longest", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Plan: {name} must be at least {least}, got {getattr(self, name)}")
        if self.recipe.seed != 0:
            raise ValueError(f"Plan: recipe must have seed 0, the plan has its own, got {self.recipe.seed}")
        if self.phrases is not None:
            describe(self.labels[1:], own=self.phrases)

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the name of each label of the data set, the background first."""
        return CLASS_NAMES[self.data]

    @property
    def tasks(self) -> list[tuple[int, ...]]:
        """Return the labels of each task that is learned; with "joint" one task has all."""
        if self.method == "joint":
            return [tuple(range(1, len(self.labels)))]
        return tasks_of(self.data, self.setting)

    def classes(self, t: int) -> list[str]:
        """Return the names of the classes of task t."""
        return [self.labels[label] for label in self.tasks[t]]

    def seed_of(self, t: int) -> int:
        """Return the seed of what is random in task t."""
        return 1000 * self.seed + t

    def training_data(self) -> Dataset:
        """Return all data to learn from; raise FileNotFoundError if they are incomplete."""
        if self.data == "digits":
            return DigitScenes("train", self.train_scenes, seed=self.seed)
        return (VOC if self.data == "voc" else ADE20K)(self.root, self.train_split)

    def test_data(self) -> Dataset:
        """Return all data to evaluate on; raise FileNotFoundError if they are incomplete."""
        if self.data == "digits":
            return DigitScenes("test", self.test_scenes, seed=self.seed)
        return (VOC if self.data == "voc" else ADE20K)(self.root, "val")

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict) -> Plan:
        """Make a plan of what ``to_json`` gave; raise ValueError if ``content`` is something else.

        A recipe without ``asymmetric_clip`` or ``one_class_token_weight`` is from a run that was begun before these
        could be chosen, and gets the values that the run used.
        """
        try:
            kept = content["recipe"]
            recipe = Recipe(**{"asymmetric_clip": 0.05, "one_class_token_weight": kept["token_weight"]} | kept)
            return cls(**content | {"recipe": recipe})
        except (TypeError, KeyError) as error:
            raise ValueError(f"Plan: {error}") from error


def check_same(kept: dict, wanted: dict, where: str) -> None:
    """Raise ValueError, naming the first entry that differs, if a run is to go on otherwise than it was begun."""
    for name, value in kept.items():
        if name == "recipe":
            check_same(value, wanted[name], where)
        elif value != wanted[name]:
            raise ValueError(
                f"{where} was begun with {name} {reprlib.repr(value)}, and is to go on with "
                f"{reprlib.repr(wanted[name])}"
            )
