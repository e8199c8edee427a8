"""Tests what adapters cannot come, go or change places: a refusal says why and leaves the runner as it was."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapted_models import (
    COMING,
    adapt,
    assert_equal,
    assert_same_bits,
    assert_untouched,
    inputs,
    loop,
    save,
    state_of,
    vit,
)

import fastcss


def other_model(tmp_path, bare):
    torch.manual_seed(1)
    config = type(bare.config)(**{**bare.config.to_dict(), "hidden_size": 16, "intermediate_size": 16})
    model = adapt(type(bare)(config), {"r": 2, "target_modules": COMING})
    return save(model, tmp_path / "other")[0]


def damaged(tmp_path, folder):
    made = tmp_path / "damaged"
    made.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (made / file.name).write_bytes(file.read_bytes())
    weights = made / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return made


def prompt(tmp_path, bare):
    made = tmp_path / "ia3"
    peft.get_peft_model(copy.deepcopy(bare), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
                        ).save_pretrained(made)  # fmt: skip
    return made


REFUSED = {
    "no folder": (lambda r, f, p, b: r.add(p / "missing"), FileNotFoundError, "missing"),
    "another model's": (lambda r, f, p, b: r.add(other_model(p, b), name="x"), ValueError, "another base model"),
    "damaged": (lambda r, f, p, b: r.add(damaged(p, f[1])), ValueError, "no whole safetensors file"),
    "of PEFT": (lambda r, f, p, b: r.add(prompt(p, b)), TypeError, "ia3"),
    "name taken": (lambda r, f, p, b: r.add(f[1], name="task0"), ValueError, "has an adapter 'task0'; swap"),
    "unknown": (lambda r, f, p, b: r.remove("tusk0"), KeyError, "did you mean 'task0'"),
    "unknown to swap": (lambda r, f, p, b: r.swap("x", f[1]), KeyError, "no adapter 'x'; there are task0"),
    "swapped for another model's": (
        lambda r, f, p, b: r.swap("task0", other_model(p, b)), ValueError, "another base model"
    ),
    "a scale that is none": (lambda r, f, p, b: r.set_scale("task0", float("nan")), ValueError, "finite, got nan"),
    "a scale that is text": (lambda r, f, p, b: r.set_scale("task0", "2"), TypeError, "must be a number, got str"),
}  # fmt: skip


OF_MODELS = ("no folder", "another model's", "of PEFT", "name taken")


@pytest.mark.parametrize(
    ("what", "source"), [*((what, "folders") for what in REFUSED), *((what, "model") for what in OF_MODELS)]
)
@torch.no_grad()
def test_a_refused_change_leaves_the_runner_as_it_was(what, source, four, tmp_path):
    act, error, message = REFUSED[what]
    bare, model, folders = four
    given, model = inputs(vit), bare if source == "folders" else model
    runner = (
        fastcss.one_pass.from_directories(bare, [folders[0], folders[2]])
        if source == "folders"
        else fastcss.one_pass(model)
    )
    before, names, held, output = state_of(model), runner.adapters, runner._model_copy, runner(**given)
    output = runner(**given)
    with pytest.raises(error, match=message):
        act(runner, folders, tmp_path, bare)
    assert runner.adapters == names
    assert runner._model_copy is held
    assert_same_bits(runner(**given), output)
    assert_untouched(model, before)


@torch.no_grad()
def test_more_refusals(four, tmp_path):
    bare, model, folders = four
    runner = fastcss.one_pass.from_directories(bare, folders[:1])
    with pytest.raises(ValueError, match="last adapter"):
        runner.remove("task0")
    live = fastcss.one_pass(model)
    model.load_adapter(folders[0], "late")
    with pytest.raises(TypeError, match=r"add: adapter must be a name or a folder.* got int"):
        runner.add(3)
    with pytest.raises(ValueError, match="keeps its name"):
        live.add("late", name="other")
    with pytest.raises(FileNotFoundError, match=r"no folder, and no adapter of the model.* are: late"):
        live.add("lote")
    with pytest.raises(ValueError, match="adapter of the model; swap it there"):
        live.swap("task0", folders[1])
    whole = adapt(copy.deepcopy(bare), {"r": 2, "target_modules": COMING, "modules_to_save": ["pooler"]})
    runner = fastcss.one_pass(whole)
    runner.add(folders[1])  # beside a module that is saved whole, if not in it
    assert_equal(runner(**inputs(vit)), [*loop(whole, inputs(vit)), *loop(model, inputs(vit), ["task1"])])
    inside = adapt(copy.deepcopy(bare), {"r": 2, "target_modules": ["dense"]})
    (folder,) = save(inside, tmp_path / "inside")
    with pytest.raises(TypeError, match=r"only plain LoRA can.*model\.load_adapter\(.*add\('inside'\) run it"):
        runner.add(folder, name="inside")
