"""Tests learning a task: what learns and what does not, that it learns, and that it can be resumed."""

from __future__ import annotations

import pytest
import torch
from decouplecss_models import build
from decouplecss_models import pictures as noise
from training_scenes import pictures_for, trainer_for

from fastcss.models.decouplecss_loss import asymmetric_loss, mask_loss, presence_probability
from fastcss.models.decouplecss_training import (
    Recipe,
    TaskTrainer,
    activate,
    detect,
    embed_phrases,
    training_step,
)
from fastcss.models.grounding_dino import LORA_SITES
from fastcss.models.task_pictures import collate
from fastcss.ops import select_tokens


def one_batch(model, count: int = 3):
    examples = pictures_for(model, count)
    return collate([examples[i] for i in range(count)])


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("sites", LORA_SITES)
def test_gradients_reach_all_of_the_task_and_nothing_else(sites):
    model = build((1, 2, 1), sites)
    task = model.tasks[1]
    own = activate(model, task)
    sum(training_step(model, task, embed_phrases(model, task), one_batch(model))).backward()
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name
    names = {name.split(".")[-1] if "lora" not in name else name.split(".")[-3] for name in own}
    assert names == {"lora_A", "lora_B", "class_embedding", "weight_1", "bias_1", "weight_2", "bias_2"}
    assert any("backbone" in name for name in own) == (sites != "fusion")
    mine = {id(parameter) for parameter in own.values()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in mine]
    assert len(others) + len(own) == len(list(model.parameters()))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in others)


def test_a_step_is_the_losses_of_the_equations():
    """The losses are worked out picture by picture, class by class, by the published form of each module."""
    model = build((1, 2))
    task, batch = model.tasks[1], one_batch(model)
    activate(model, task)
    phrases = embed_phrases(model, task)
    logits, probabilities = [], []
    for b, picture in enumerate(batch.pixel_values):
        tokens, classes, _ = model.detector(picture[None], phrases=phrases)
        found = select_tokens(tokens, classes, threshold=0.05, length=128, impl="reference")
        cosine = torch.nn.functional.cosine_similarity(tokens[:, :, None], classes[:, None], dim=-1)
        probabilities.append(presence_probability(found, cosine.amax(1), 0.05))
        embedding = model.segmenter.embed(batch.sam_pixel_values[b, None])
        first = sum(batch.masks_of[:b])
        for k in batch.index[first : first + batch.masks_of[b]].split(1):
            prompt = task.generator(found.tokens[0, k], k)
            logits.append(model.segmenter.decode(embedding, prompt).masks)
    losses = training_step(model, task, phrases, batch)
    torch.testing.assert_close(losses.masks, mask_loss(torch.cat(logits), batch.masks))
    torch.testing.assert_close(losses.presence, asymmetric_loss(torch.cat(probabilities), batch.present))


def test_what_the_detector_overlooks_is_learnt_all_the_same():
    """The adapter must learn from the largest cosine, and a new generator at least the bias, from a mask without
    tokens."""
    model = build((2,))
    model.threshold = 1.0
    task, batch = model.tasks[0], one_batch(model)
    own, phrases = activate(model, task), embed_phrases(model, task)
    losses = training_step(model, task, phrases, batch)
    losses.presence.backward()
    adapter = [parameter for name, parameter in own.items() if name.startswith("detector.")]
    assert all((parameter.grad != 0).any() for parameter in adapter)
    before = [parameter.grad.clone() for parameter in adapter]
    losses = training_step(model, task, phrases, batch)
    losses.masks.backward()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(adapter, before, strict=True))
    assert (task.generator.bias_2.grad[batch.index] != 0).all()


def test_an_epoch_changes_the_task_and_leaves_all_else_bit_for_bit():
    trainer = trainer_for((1, 2, 1, 2))
    before = weights(trainer.model)
    trainer.run_epoch()
    after = weights(trainer.model)
    own = {name for name in before if ".task3." in name or name.startswith("tasks.3.generator.")}
    assert own
    assert all(not torch.equal(before[name], after[name]) for name in own)
    rest = before.keys() - own
    assert same_bits({name: before[name] for name in rest}, {name: after[name] for name in rest})


def test_it_learns_a_batch():
    model = build((2,))
    with torch.no_grad():  # a random SAM's masks are nearly flat, unlike a trained one's
        model.segmenter.model.mask_decoder.output_hypernetworks_mlps[0].proj_out.weight.mul_(30)
    task, batch = model.tasks[0], one_batch(model)
    optimizer = torch.optim.AdamW(activate(model, task).values(), lr=1e-2)
    phrases, losses = embed_phrases(model, task), []
    for _ in range(31):
        losses.append(training_step(model, task, phrases, batch))
        optimizer.zero_grad()
        sum(losses[-1]).backward()
        optimizer.step()
    first, last = losses[0], losses[-1]
    assert last.masks < 0.85 * first.masks
    assert last.presence < 0.3 * first.presence


def test_a_batch_costs_the_same_however_many_tasks_there_are():
    def cost(before: int) -> tuple[int, int, int]:
        model = build((1,) * before + (2,))
        task, batch, saved = model.tasks[-1], one_batch(model), []
        activate(model, task)
        phrases = embed_phrases(model, task)
        with (
            torch.utils.flop_counter.FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x),
        ):
            sum(training_step(model, task, phrases, batch)).backward()
        learning = sum(p.numel() for p in model.parameters() if p.grad is not None)
        return counter.get_total_flops(), sum(saved), learning

    assert cost(0) == cost(5)


def test_same_seed_same_weights_and_another_seed_others():
    first, second, other = (trainer_for(seed=seed) for seed in (0, 0, 1))
    for number, trainer in enumerate((first, second, other)):
        torch.manual_seed(number)  # the global generator does not matter
        trainer.run_epoch()
    assert same_bits(weights(first.model), weights(second.model))
    assert not same_bits(weights(first.model), weights(other.model))


def test_the_global_generator_is_left_alone():
    trainer = trainer_for()
    before = torch.get_rng_state()
    trainer.run_epoch()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_resumed_training_is_the_unbroken_one(finished):
    unbroken = trainer_for()
    for _ in range(finished):
        unbroken.run_epoch()
    kept, state = weights(unbroken.model), unbroken.state_dict()
    while unbroken.epoch < 3:
        unbroken.run_epoch()
    resumed = trainer_for()
    resumed.model.load_state_dict(kept)
    resumed.load_state_dict(state)
    assert resumed.epoch == finished
    while resumed.epoch < 3:
        resumed.run_epoch()
    assert same_bits(weights(resumed.model), weights(unbroken.model))
    assert same_bits(resumed.state_dict(), unbroken.state_dict())


def test_a_state_of_something_else_is_refused():
    trainer = trainer_for()
    trainer.run_epoch()
    state = trainer.state_dict()
    other = trainer_for(batch_size=5)
    with pytest.raises(ValueError, match=r"1 steps of every parameter, got 1 with 3 to 3"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="up to 1 epochs"):
        trainer_for(epochs=1).load_state_dict(state | {"epoch": torch.tensor(2)})
    name = next(name for name in state if name.startswith("generator.weight_1/exp_avg"))
    with pytest.raises(ValueError, match=r"state has generator.weight_1/exp_avg \[3\], the task \[2, 128, 64\]"):
        other.load_state_dict(state | {name: torch.zeros(3)})
    with pytest.raises(ValueError, match="the task no parameter of that name"):
        other.load_state_dict(state | {"elsewhere/step": torch.tensor(3.0)})
    missing = {name: value for name, value in state.items() if not name.startswith("generator.bias_2/")}
    with pytest.raises(ValueError, match="0 to 3 steps"):
        trainer_for().load_state_dict(missing)
    assert other.epoch == 0
    assert other.state_dict().keys() == {"epoch", "order"}


def test_rates_fall_along_the_polynomial():
    trainer, rates = trainer_for(epochs=2, learning_rate=0.1, power=0.5), []
    while trainer.epoch < 2:
        trainer.run_epoch(lambda _: rates.append(trainer._optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.1 * (1 - i / 6) ** 0.5 for i in range(6)])
    with pytest.raises(RuntimeError, match="all 2 epochs are finished"):
        trainer.run_epoch()


def test_report_and_means():
    trainer, reported = trainer_for(), []
    mean = trainer.run_epoch(reported.append)
    assert len(reported) == 3
    torch.testing.assert_close(mean.masks, torch.stack([losses.masks for losses in reported]).mean())
    torch.testing.assert_close(mean.presence, torch.stack([losses.presence for losses in reported]).mean())


def test_clipped_gradients():
    free, clipped = trainer_for(count=2), trainer_for(count=2, clip=1e-3)
    for trainer in (free, clipped):
        trainer.run_epoch()
    norms = [
        torch.stack([p.grad.norm() for p in activate(trainer.model, trainer.task).values()]).norm()
        for trainer in (free, clipped)
    ]
    assert norms[0] > 2e-3
    torch.testing.assert_close(norms[1], torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_adapters_switched_in_between_do_not_matter():
    first, second = trainer_for(), trainer_for()
    for trainer in (first, second):
        trainer.run_epoch()
        if trainer is second:
            second.model.segment(**noise(1), mode="shared")
            activate(second.model, second.model.tasks[0])
        trainer.run_epoch()
    assert same_bits(weights(first.model), weights(second.model))


def test_what_was_trained_is_what_segments():
    trainer = trainer_for()
    model, given = trainer.model, noise(1)
    before = model.segment(**given)
    trainer.run_epoch()
    after = model.segment(**given)
    assert not torch.equal(after.presence, before.presence)
    torch.testing.assert_close(after.presence, model.segment(**given, mode="literal").presence)


def test_losses_that_are_not_finite_are_told():
    trainer = trainer_for()
    with torch.no_grad():
        trainer.task.generator.bias_2.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the losses of epoch 0 are not finite"):
        trainer.run_epoch()


def test_labels_and_classes_must_be_as_many():
    model = build((3,))
    with pytest.raises(ValueError, match=r"a label for each class of the task, 3, got 2"):
        TaskTrainer(model, model.tasks[0], pictures_for(model))
    for name in ("epochs", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Recipe(**{name: 0})
    for weight in (-0.5, float("nan")):
        for name in ("token_weight", "one_class_token_weight"):
            with pytest.raises(ValueError, match=f"Recipe: {name} must be at least 0, got {weight}"):
                Recipe(**{name: weight})
    for clip in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"asymmetric_clip must be from 0 to below 1, got {clip}"):
            Recipe(asymmetric_clip=clip)


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_a_step_has_the_recipe_s_asymmetric_loss(clip):
    """The cosines of absent classes are above some of these clips."""
    trainer, again = trainer_for(count=2, asymmetric_clip=clip), trainer_for(count=2, asymmetric_clip=clip)
    phrases, batch = embed_phrases(again.model, again.task), one_batch(again.model, 2)
    found, detected = detect(again.model, phrases, batch.pixel_values)
    cosine = [torch.cosine_similarity(of.tokens[:, None], of.classes[None], dim=-1).amax(0) for of in detected]
    probability = presence_probability(found, torch.stack(cosine), again.model.threshold)
    assert (probability[~batch.present] < 0.3).any()
    expected = asymmetric_loss(probability, batch.present, clip=clip)
    torch.testing.assert_close(trainer.run_epoch().presence, expected.detach())
