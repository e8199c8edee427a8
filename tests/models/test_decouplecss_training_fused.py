"""Tests learning on fused modules: losses and gradients must be the unfused model's, and names in its folder, too."""

from __future__ import annotations

import pytest
import torch
from decouplecss_models import build, pictures
from safetensors.torch import load_file
from torch import Tensor
from training_scenes import pictures_for, trainer_for

import fastcss
from fastcss.models.decouplecss import DecoupleCSS
from fastcss.models.decouplecss_folder import load, save_base, save_task
from fastcss.models.decouplecss_training import activate, embed_phrases, training_step
from fastcss.models.grounding_dino import LORA_SITES
from fastcss.models.task_pictures import collate

EXACT = 1e-5  # float32, of a tensor's largest value: sums in another order
SIZES = (1, 2)


def step_of(model: DecoupleCSS) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute losses and gradients of the last task's step on three pictures of two sizes."""
    task, examples = model.tasks[-1], pictures_for(model, 3)
    own, phrases, batch = activate(model, task), embed_phrases(model, task), collate([examples[i] for i in range(3)])
    batch = batch._replace(
        pixel_values=[picture.to(phrases) for picture in batch.pixel_values],
        sam_pixel_values=batch.sam_pixel_values.to(phrases),
    )
    losses = training_step(model, task, phrases, batch)
    gradients = torch.autograd.grad(sum(losses), list(own.values()))
    return torch.stack(losses).detach(), dict(zip(own, gradients, strict=True))


@pytest.mark.parametrize("sites", LORA_SITES)
def test_a_step_is_that_of_the_model_as_it_is(sites):
    """Both are roundings of the step in float64, and the fused one must be no further from it."""
    model = build(SIZES, sites)
    losses, gradients = step_of(model)
    fusion = fastcss.fuse(model.detector)
    swin = {"window_attention"} if sites != "convnext+fusion" else set()
    assert set(fusion.replaced.values()) == swin | {"deformable_attention", "bi_attention", "linear"}
    fused_losses, fused_gradients = step_of(model)
    torch.testing.assert_close(fused_losses, losses, rtol=EXACT, atol=0)
    fusion.undo()
    again, gradients_again = step_of(model)
    assert torch.equal(again, losses)
    assert all(torch.equal(gradients_again[name], gradient) for name, gradient in gradients.items())
    _, exact = step_of(model.double())
    assert exact.keys() == gradients.keys() == fused_gradients.keys()
    for name, expected in exact.items():
        fused, own = ((of[name] - expected).abs().max() for of in (fused_gradients, gradients))
        assert fused <= own + EXACT * expected.abs().max(), name
        assert own <= 1e-4 * expected.abs().max(), name


def test_what_is_saved_has_the_same_names_and_is_loaded_unfused(tmp_path):
    learned = {}
    for how in ("as it is", "fused"):
        trainer = trainer_for(SIZES, epochs=1)
        if how == "fused":
            fastcss.fuse(trainer.model.detector)
        trainer.run_epoch()
        save_base(trainer.model, tmp_path / how)
        for t in range(len(SIZES)):
            save_task(trainer.model, t, tmp_path / how)
        learned[how] = {
            str(path.relative_to(tmp_path / how)): load_file(path) for path in (tmp_path / how).rglob("*.safetensors")
        }
    assert learned["fused"].keys() == learned["as it is"].keys()
    for file, tensors in learned["fused"].items():
        assert {name: x.shape for name, x in tensors.items()} == {
            name: x.shape for name, x in learned["as it is"][file].items()
        }
    model = load(tmp_path / "fused")
    assert fastcss.fuse(model.detector).refused == {}
    (labels,), (expected,) = (m.segment(**pictures(1)).labels for m in (model, trainer.model))
    assert torch.equal(labels, expected)
