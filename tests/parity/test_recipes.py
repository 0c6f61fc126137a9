"""The ImageNet recipes against what the released training code was recorded to do."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from adaptvit.training.recipes import avit_small_imagenet, avit_tiny_imagenet

RECIPES = {"tiny": avit_tiny_imagenet, "small": avit_small_imagenet}


@pytest.mark.parametrize("size", RECIPES)
def test_the_numbers_of_the_recipe(size: str, avit_recipe: Path) -> None:
    record, run = json.loads(avit_recipe.read_text()), RECIPES[size]()
    defaults, one = record["parser_defaults"], record["recipes"][size]
    given, recipe, method, data = one["recipe"], run.recipe, run.method, run.data
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs) == (
        100,
        given["batch_size"],
        given["warmup_epochs"],
    )
    assert recipe.learning_rate == pytest.approx(one["scaled_lr"])
    assert (method.gate_scale, method.gate_center) == (given["gate_scale"], given["gate_center"])
    assert method.ponder_weight == given["ponder_token_scale"]
    assert method.prior_weight == given["distr_prior_alpha"]
    assert run.pretrained == given["pretrained"]
    for ours, theirs in (
        (run.drop_path, "drop_path"),
        (recipe.ema_decay, "model_ema_decay"),
        (recipe.optimizer, "opt"),
        (recipe.clip_grad, "clip_grad"),
        (recipe.weight_decay, "weight_decay"),
        (recipe.warmup_learning_rate, "warmup_lr"),
        (recipe.least_learning_rate, "min_lr"),
        (recipe.label_smoothing, "smoothing"),
        (recipe.mixup, "mixup"),
        (recipe.cutmix, "cutmix"),
        (data.auto_augment, "aa"),
        (data.interpolation, "train_interpolation"),
        (data.re_prob, "reprob"),
    ):
        assert ours == defaults[theirs], theirs
    assert data.repeated_augmentation == 3 * defaults["repeated_aug"]


@pytest.mark.parametrize("size", RECIPES)
def test_the_learning_rate_is_the_recorded_one_an_epoch_earlier(size: str, avit_recipe: Path) -> None:
    """The released code sets an epoch's rate after it, with its own number: epoch e + 1 runs at the rate of e."""
    expected = json.loads(avit_recipe.read_text())["recipes"][size].get("lr_per_epoch")
    assert expected, f"{avit_recipe} has no learning rates for {size}"
    recipe = RECIPES[size]().recipe
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_learning_rate,
        min_lr=recipe.least_learning_rate,
        step_on_epochs=False,
        updates_per_epoch=10,
    )
    rates = []
    for epoch in range(recipe.epochs - 1):
        scheduler.step_update(10 * epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected[1:], rel=1e-6)


def test_weight_decay_leaves_out_the_recorded_parameters(avit_recipe: Path) -> None:
    groups = json.loads(avit_recipe.read_text())["recipes"]["tiny"]["param_groups"]
    model = avit_tiny_imagenet().method.build(timm.create_model("deit_tiny_patch16_224", depth=2))
    names = {id(parameter): name.removeprefix("vit.") for name, parameter in model.named_parameters()}
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05)
    ours = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert ours == {group["weight_decay"]: set(group["params"]) for group in groups}


def test_repeated_augmentation_takes_the_recorded_images(avit_sampler: Path) -> None:
    for case in json.loads(avit_sampler.read_text())["cases"]:
        place = {"num_replicas": case["num_replicas"], "rank": case["rank"]}
        sampler = RepeatAugSampler(range(case["dataset_len"]), **place, num_repeats=3)
        sampler.set_epoch(case["epoch"])
        assert list(sampler) == case["indices"]
        assert len(sampler) == case["length"]
