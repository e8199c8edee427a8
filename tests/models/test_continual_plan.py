"""Tests plans of continual runs: what they say, what they refuse, and where the data come from."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from continual_runs import plan_of
from PIL import Image

from fastcss.data import CLASS_NAMES, SETTINGS, VOC, DigitScenes
from fastcss.data.voc import lists
from fastcss.models.continual_plan import DEFAULTS, Plan, check_same
from fastcss.models.decouplecss_training import Recipe

OWN = {name: [f"drawn {name}"] for name in CLASS_NAMES["digits"][1:]}


@pytest.mark.parametrize("phrases", [None, OWN])
def test_a_plan_comes_back_from_json(phrases):
    plan = plan_of(method="naive", seed=3, phrases=phrases, recipe=Recipe(epochs=7, clip=0.5))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("data", DEFAULTS)
def test_the_defaults_make_a_plan_for_every_setting(data):
    for setting in SETTINGS[data]:
        plan = Plan(data, setting, root=None if data == "digits" else "somewhere", **DEFAULTS[data].plan)
        assert [label for labels in plan.tasks for label in labels] == list(range(1, len(CLASS_NAMES[data])))


def test_the_defaults_are_the_papers():
    for data, threshold, length, epochs in (("voc", 0.3, 512, 5), ("ade", 0.2, 1024, 20)):
        settings, plan = DEFAULTS[data]
        assert (settings["threshold"], settings["length"], settings["rank"]) == (threshold, length, 32)
        recipe = plan["recipe"]
        assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (epochs, 24, 1e-4, 0.05)


def test_a_run_of_before_there_was_a_choice_is_read_as_what_it_did():
    for weight in (0.0, 1.5):
        old = plan_of(recipe=Recipe(token_weight=weight)).to_json()
        for name in ("asymmetric_clip", "one_class_token_weight"):
            del old["recipe"][name]
        recipe = Plan.from_json(old).recipe
        assert (recipe.asymmetric_clip, recipe.one_class_token_weight) == (0.05, weight)
    new = plan_of(recipe=Recipe(asymmetric_clip=0.0, one_class_token_weight=2.0, token_weight=0.5))
    assert Plan.from_json(json.loads(json.dumps(new.to_json()))) == new


def test_the_papers_tasks_of_one_class_have_negatives_and_its_lists_are_the_long_ones():
    for data, setting in (("voc", "19-1"), ("voc", "15-1"), ("voc", "10-1"), ("digits", "5-1")):
        plan = Plan(data, setting, root=None if data == "digits" else "somewhere", **DEFAULTS[data].plan)
        assert len(plan.tasks[-1]) == 1
        assert plan.recipe.token_weight_of(1) > 0
        assert plan.recipe.asymmetric_clip == 0
    assert DEFAULTS["voc"].plan["train_split"] == "train_aug"


def test_tasks_and_their_names():
    plan = plan_of(setting="4-3")
    assert plan.tasks == [(1, 2, 3, 4), (5, 6, 7), (8, 9, 10)]
    assert plan.classes(2) == ["seven", "eight", "nine"]
    joint = dataclasses.replace(plan, method="joint")
    assert joint.tasks == [tuple(range(1, 11))]
    assert joint.classes(0) == list(CLASS_NAMES["digits"][1:])


def test_no_two_tasks_or_seeds_draw_the_same():
    seeds = [plan_of(seed=seed).seed_of(t) for seed in range(4) for t in range(151)]
    assert len(set(seeds)) == len(seeds)


def test_the_digits_follow_from_the_seed():
    plan = plan_of(seed=5, train_scenes=3, test_scenes=2)
    for got, expected in (
        (plan.training_data(), DigitScenes("train", 3, seed=5)),
        (plan.test_data(), DigitScenes("test", 2, seed=5)),
    ):
        assert len(got) == len(expected)
        assert all((got[i][0] == expected[i][0]).all() for i in range(len(got)))


def test_lists_of_voc_and_what_they_lead_to(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for the folders"):
        lists(tmp_path)
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for split, names in (("train", ["a"]), ("val", ["b"])):
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
    assert lists(tmp_path) == ["train", "val"]
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text("a\nc")
    assert lists(tmp_path) == ["train", "val", "train_aug"]
    for name in "abc":
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"JPEGImages/{name}.jpg")
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            Image.fromarray(np.full((4, 4), 3, np.uint8)).save(tmp_path / f"{folder}/{name}.png")
    plan = Plan("voc", "15-5", root=str(tmp_path), train_split="train_aug")
    assert isinstance(plan.test_data(), VOC)
    assert (len(plan.training_data()), len(plan.test_data())) == (2, 1)
    assert len(dataclasses.replace(plan, train_split="train").training_data()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "coco"}, "data must be one of voc, ade, digits or a number, got 'coco'"),
        ({"setting": "4"}, "setting must be like 15-5"),
        ({"setting": "4-4"}, "'4-4' does not divide 10 classes"),
        ({"method": "ewc"}, "method must be one of decouplecss, naive, joint, got 'ewc'"),
        ({"root": "here"}, "root must be None for digits, got here"),
        ({"train_split": "train_aug"}, "train_split must be train, got 'train_aug'"),
        ({"train_scenes": 0}, "train_scenes must be at least 1, got 0"),
        ({"test_scenes": None}, "test_scenes must be at least 1, got None"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"shortest": 0}, "shortest must be at least 1, got 0"),
        ({"recipe": Recipe(seed=2)}, "recipe must have seed 0, the plan has its own, got 2"),
        ({"phrases": {"one": ["thin"]}}, "own has no phrases for class 'zero'"),
        ({"data": "voc", "setting": "15-5"}, "root must be a folder for voc, got None"),
        ({"data": "voc", "setting": "15-5", "root": "here"}, "train_scenes must be None, got 8"),
        ({"data": "voc", "setting": "15-5", "root": "here", "train_split": "val"}, "must be train or train_aug"),
    ],
)
def test_what_is_no_plan_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**fields)


@pytest.mark.parametrize("content", [{}, {"data": "digits"}, plan_of().to_json() | {"momentum": 1}])
def test_json_that_is_no_plan_is_refused(content):
    with pytest.raises(ValueError, match="Plan: "):
        Plan.from_json(content)


def test_the_first_difference_is_named():
    kept = plan_of()
    check_same(kept.to_json(), kept.to_json(), "run")
    other = dataclasses.replace(kept, seed=1, recipe=Recipe(epochs=9))
    with pytest.raises(ValueError, match="run was begun with seed 0, and is to go on with 1"):
        check_same(kept.to_json(), other.to_json(), "run")
    other = dataclasses.replace(kept, recipe=dataclasses.replace(kept.recipe, epochs=9))
    with pytest.raises(ValueError, match="run was begun with epochs 2, and is to go on with 9"):
        check_same(kept.to_json(), other.to_json(), "run")
