"""Recipes: functions that return a `Run`, to be changed on the command line, by YAML or with `dataclasses.replace`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptvit.data import DataConfig, MasksConfig
from adaptvit.methods.adavit import AdaViTConfig
from adaptvit.methods.ats import ATSConfig
from adaptvit.methods.avit import AViTConfig
from adaptvit.methods.base import MethodConfig
from adaptvit.methods.dynamicvit import DynamicViTConfig
from adaptvit.methods.evit import EViTConfig
from adaptvit.methods.exits import ExitConfig
from adaptvit.methods.full import FullConfig
from adaptvit.methods.merge import CalibratedConfig, MergeConfig
from adaptvit.methods.released import ReleasedAdaViTConfig
from adaptvit.methods.run_length import RunLengthConfig
from adaptvit.methods.tome import ToMeConfig
from adaptvit.training.recipe import Recipe
from adaptvit.training.run import Run


def digits() -> Run:
    """A small ViT with halting on the embedded digits, from scratch: a minute on two CPU cores."""
    return Run(
        model="vit_tiny_patch16_224",
        model_args={"img_size": 32, "patch_size": 4, "in_chans": 1, "embed_dim": 96, "depth": 8, "num_heads": 3},
        method=AViTConfig(gate_scale=0.15, prior_weight=0.0, ponder_weight=0.0),
        data=DataConfig(),
        recipe=Recipe(
            epochs=12, batch_size=48, optimizer="muon", learning_rate=0.02, target=0.5, ease_epochs=8, steer_every=10
        ),
        output=Path("runs/digits"),
    )


def digits_dense() -> Run:
    """The same ViT on the same digits with nothing left out."""
    halting = digits()
    return replace(
        halting,
        method=FullConfig(),
        recipe=replace(halting.recipe, target=None, ease_epochs=0.0),
        output=Path("runs/digits_dense"),
    )


def avit_tiny_imagenet() -> Run:
    """A-ViT tiny as released, for ImageNet on 4 GPUs: `torchrun --nproc-per-node 4 --no-python adaptvit train ...`.

    Differs from the released code, which follows DeiT with two slips: the warm-up rises every update rather than
    staying at 1e-6 for two epochs, and the averaged weights are what is evaluated and kept. Mixed precision is
    bfloat16 rather than float16.
    """
    return Run(
        model="deit_tiny_patch16_224",
        pretrained=True,
        drop_path=0.1,
        method=AViTConfig(gate_scale=10.0, gate_center=30.0, ponder_weight=5e-4, prior_weight=1e-3),
        data=DataConfig(
            root=Path("imagenet"),
            interpolation="bicubic",
            auto_augment="rand-m9-mstd0.5-inc1",
            re_prob=0.25,
            repeated_augmentation=3,
            workers=10,
        ),
        recipe=Recipe(
            epochs=100,
            batch_size=128,
            learning_rate=5e-4,
            warmup_learning_rate=1e-6,
            least_learning_rate=1e-5,
            warmup_epochs=5,
            mixup=0.8,
            cutmix=1.0,
            clip_grad=None,
            ema_decay=0.99996,
            precision="bfloat16",
        ),
        output=Path("runs/avit_tiny_imagenet"),
    )


def avit_small_imagenet() -> Run:
    """A-ViT small as released; differs as `avit_tiny_imagenet` does."""
    tiny = avit_tiny_imagenet()
    return replace(
        tiny,
        model="deit_small_patch16_224",
        method=AViTConfig(gate_scale=10.0, gate_center=75.0, ponder_weight=5e-4, prior_weight=1e-3),
        recipe=replace(tiny.recipe, batch_size=96, learning_rate=2.25e-4),
        output=Path("runs/avit_small_imagenet"),
    )


def adavit_small_imagenet() -> Run:
    """AdaViT on DeiT-small for ImageNet on 8 GPUs, by the defaults of the released code, which gives no command.

    The usage targets are our choice: by the released tables they make 2.26 GMACs, the published model's 2.3. Differs in
    mixed precision, which is bfloat16, and in the 10 epochs at the lowest learning rate that the released code appends.
    """
    tiny = avit_tiny_imagenet()
    assert isinstance(tiny.data, DataConfig)
    return replace(
        tiny,
        model="deit_small_patch16_224",
        method=ReleasedAdaViTConfig(usage_targets=(0.7, 0.8, 0.8), usage_weight=2.0),
        data=replace(tiny.data, crop_pct=0.9, repeated_augmentation=1),
        recipe=replace(tiny.recipe, epochs=300, batch_size=64, warmup_epochs=10, freeze=("pos_embed",)),
        output=Path("runs/adavit_small_imagenet"),
    )


def adavit_t2t_19_imagenet() -> Run:
    """AdaViT on T2T-ViT-19, from its authors' weights; 3.88 GMACs by the released tables, the published model's 3.9.

    Differs as `adavit_small_imagenet` does; the weight decay is that of T2T-ViT-19's own training.
    """
    small = adavit_small_imagenet()
    return replace(
        small,
        model="t2t_vit_19",
        pretrained=False,
        weights=Path("t2t_vit_19.pth.tar"),
        method=ReleasedAdaViTConfig(usage_targets=(0.7, 0.7, 0.8), usage_weight=2.0),
        recipe=replace(small.recipe, weight_decay=0.065, freeze=()),
        output=Path("runs/adavit_t2t_19_imagenet"),
    )


def evit_small_imagenet() -> Run:
    """EViT fine-tuned from DeiT-small for ImageNet on 8 GPUs with 256 images each: the published 30 epochs.

    They reduce from the start; the published 300 epochs from scratch do so from epoch 10 on, by a schedule that
    `adaptvit.methods.evit.keep_rate_at` gives and no recipe reads. Differs in mixed precision, which is bfloat16; the
    number of GPUs is our choice, to which the learning rate is scaled as published, by images over 512.
    """
    tiny = avit_tiny_imagenet()
    return replace(
        tiny,
        model="deit_small_patch16_224",
        method=EViTConfig(),
        recipe=replace(
            tiny.recipe,
            epochs=30,
            batch_size=256,
            learning_rate=8e-5,
            least_learning_rate=2e-6,
            warmup_epochs=0,
            weight_decay=1e-6,
        ),
        output=Path("runs/evit_small_imagenet"),
    )


def dynamicvit_small_imagenet() -> Run:
    """DynamicViT from DeiT-small for ImageNet on 8 GPUs with 128 images each: the published 30 epochs.

    Differs: the backbone learns from the start, at the published hundredth of the predictors' rate, not after epoch 5;
    mixed precision is bfloat16. A share of 1/3 for the teacher makes its weight half that of the labels, and the other
    losses are scaled to it.
    """
    tiny = avit_tiny_imagenet()
    assert isinstance(tiny.data, DataConfig)
    return replace(
        tiny,
        model="deit_small_patch16_224",
        drop_path=0.0,
        teacher="deit_small_patch16_224",
        method=DynamicViTConfig(ratio_weight=4 / 3, token_weight=1 / 3),
        data=replace(tiny.data, repeated_augmentation=1),
        recipe=replace(
            tiny.recipe,
            epochs=30,
            learning_rate=1e-5,
            method_learning_rate=100.0,
            warmup_learning_rate=1e-8,
            least_learning_rate=1e-8,
            ema_decay=0.9999,
            distillation_weight=1 / 3,
            freeze=("cls_token", "pos_embed"),
        ),
        output=Path("runs/dynamicvit_small_imagenet"),
    )


def imagenette_dense() -> Run:
    """The plain ViT-Tiny fine-tuned on Imagenette at 128 pixels: what the adaptive ones are compared with."""
    return Run(
        model="vit_tiny_patch16_224",
        img_size=128,
        weights=Path("vit_tiny_patch16_224.safetensors"),
        method=FullConfig(),
        data=DataConfig(root=Path("imagenette160"), crop_pct=1.0, scale=(0.35, 1.0)),
        recipe=Recipe(epochs=3, learning_rate=1e-4, warmup_epochs=0),
        output=Path("runs/imagenette_dense"),
    )


def playground_dense() -> Run:
    """A small ViT for photographs, nothing left out, from scratch on Imagenette at 80 pixels: an hour on one core.

    Patches of 8 pixels: what `playground` then shows at 160, where there are so many tokens that leaving some out saves
    time even of a single photograph.
    """
    return Run(
        model="vit_tiny_patch16_224",
        model_args={"patch_size": 8, "depth": 8},
        img_size=80,
        method=FullConfig(),
        data=DataConfig(root=Path("imagenette160"), crop_pct=1.0, scale=(0.35, 1.0)),
        recipe=Recipe(
            epochs=24, batch_size=32, optimizer="muon", learning_rate=0.002, precision="bfloat16", evaluate_every=4
        ),
        output=Path("runs/playground_dense"),
    )


def playground() -> Run:
    """The same ViT at 160 pixels with EViT at half of the MACs, from what `playground_dense` left."""
    dense = playground_dense()
    return replace(
        dense,
        model="runs/playground_dense/model.safetensors",
        model_args={},
        img_size=160,
        method=EViTConfig(),
        recipe=replace(
            dense.recipe, epochs=3, learning_rate=3e-4, warmup_epochs=0, target=0.5, ease_epochs=0.5, evaluate_every=0
        ),
        output=Path("runs/playground"),
    )


def _fine_tuned(name: str, method: MethodConfig) -> Run:
    """The same on the way to half the dense MACs, alike for every method but where its recipe says otherwise.

    The method is fitted to the weights first; the budget comes down over an epoch, and the knob is steered to it;
    averaged weights are kept. `weights` and `teacher` are best the dense model.
    """
    dense = imagenette_dense()
    eased: dict[str, Any] = {"target": 0.5, "ease_epochs": 1.0, "steer_every": 20}
    recipe = replace(dense.recipe, method_learning_rate=5.0, ema_decay=0.99, **eased)
    return replace(dense, method=method, fit=True, recipe=recipe, output=Path("runs") / name)


def imagenette_avit() -> Run:
    """A-ViT fine-tuned on the same images, at half the dense MACs."""
    return _fine_tuned("imagenette_avit", AViTConfig(prior_weight=0.0, ponder_weight=0.0, class_token="stays"))


def imagenette_ats() -> Run:
    """Adaptive token sampling fine-tuned on the same images, at half the dense MACs."""
    return _fine_tuned("imagenette_ats", ATSConfig(blocks=(3, 6, 9)))


def imagenette_adavit() -> Run:
    """AdaViT fine-tuned on the same images, at half the dense MACs, to which its knob is steered."""
    method = AdaViTConfig(
        first_patch_block=1, patch_threshold=0.5, norm_policies=True, noise=0.0, initial_bias=3.0, macs_target=None
    )
    return _fine_tuned("imagenette_adavit", method)


def imagenette_evit() -> Run:
    """EViT fine-tuned on the same images, at half the dense MACs."""
    return _fine_tuned("imagenette_evit", EViTConfig(blocks=(2, 5, 8)))


def imagenette_exit() -> Run:
    """Exits trained with the ViT on the same images, which all run to its end; the knob is turned after that."""
    run = _fine_tuned("imagenette_exit", ExitConfig())
    return replace(run, recipe=replace(run.recipe, ease_epochs=0.0, steer_every=1_000_000))


def imagenette_dynamicvit() -> Run:
    """DynamicViT fine-tuned on the same images, at half the dense MACs, by the teacher's logits and patches."""
    return _fine_tuned("imagenette_dynamicvit", DynamicViTConfig(blocks=(1, 4, 7)))


def imagenette_tome() -> Run:
    """ToMe fine-tuned on the same images, at half the dense MACs."""
    return _fine_tuned("imagenette_tome", ToMeConfig())


def imagenette_merge() -> Run:
    """Merging by similarity fine-tuned on the same images, at half the dense MACs."""
    return _fine_tuned("imagenette_merge", MergeConfig())


def imagenette_calibrated() -> Run:
    """Calibrated merging fine-tuned on the same images, at half the dense MACs."""
    return _fine_tuned("imagenette_calibrated", CalibratedConfig())


def camvid_dense() -> Run:
    """ViT-Tiny with a small head on CamVid's street scenes, 480 x 352 pixels of 11 classes; nothing left out.

    What lies before its last four blocks stays as it is, so that an epoch takes two minutes on a CPU core.
    """
    return Run(
        model="vit_tiny_patch16_224",
        img_size=(352, 480),
        weights=Path("vit_tiny_patch16_224.safetensors"),
        method=FullConfig(),
        data=MasksConfig(
            root=Path("camvid480"),
            classes=CAMVID,
            ignored=(11,),
            test_split="val",
            color_jitter=0.3,
            workers=0,
        ),
        recipe=Recipe(
            epochs=2,
            batch_size=2,
            learning_rate=1e-4,
            head_learning_rate=10.0,
            warmup_epochs=0,
            label_smoothing=0.0,
            precision="bfloat16",
            freeze=("vit.cls_token", "vit.pos_embed", "vit.patch_embed.*", "vit.blocks.[0-7].*"),
            evaluate_every=0,
        ),
        output=Path("runs/camvid_dense"),
    )


def camvid_merge() -> Run:
    """Merging by similarity at 60 % of the dense MACs, from what `camvid_dense` left."""
    return _at_budget(
        camvid_dense(), "camvid_merge", MergeConfig(), target=0.6, learning_rate=5e-5, head_learning_rate=4.0
    )


def _at_budget(dense: Run, name: str, method: MethodConfig, **recipe: Any) -> Run:
    """An epoch more of a dense model that is trained, with a method that is fitted to it, at a budget."""
    return replace(
        dense,
        model=str(dense.output / "model.safetensors"),
        img_size=None,
        frames=None,
        weights=None,
        method=method,
        fit=True,
        recipe=replace(dense.recipe, epochs=1, warmup_epochs=0, **recipe),
        output=Path("runs") / name,
    )


CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
"""Values 0 to 10 of the masks of SegNet's CamVid; 11 is void."""


def asl24_dense() -> Run:
    """ViT-Tiny inflated to clips of 8 frames at 96 pixels, fine-tuned on hand shapes of the American alphabet.

    No clip is mirrored: a mirrored hand is the other hand. Patches of one frame each are 8 x 6 x 6.
    """
    return Run(
        model="vit_tiny_patch16_224",
        img_size=96,
        frames=8,
        tubelet=1,
        weights=Path("vit_tiny_patch16_224.safetensors"),
        method=FullConfig(),
        data=DataConfig(root=Path("asl24"), strip=16, crop_pct=1.0, scale=(0.5, 1.0), hflip=0.0),
        recipe=Recipe(
            epochs=6, batch_size=16, learning_rate=2e-4, warmup_epochs=1, precision="bfloat16", evaluate_every=2
        ),
        output=Path("runs/asl24_dense"),
    )


def hockey_dense() -> Run:
    """The same on fights in ice hockey, whose clips may be mirrored."""
    hands = asl24_dense()
    return replace(
        hands,
        data=replace(hands.data, root=Path("hockeyfights"), hflip=0.5),
        output=Path("runs/hockey_dense"),
    )


def asl24_runlength() -> Run:
    """Run-length tokens at 40 % of the dense MACs, from what `asl24_dense` left."""
    return _clips_at_budget(asl24_dense(), "asl24_runlength")


def hockey_runlength() -> Run:
    """Run-length tokens at 40 % of the dense MACs, from what `hockey_dense` left."""
    return _clips_at_budget(hockey_dense(), "hockey_runlength")


def _clips_at_budget(dense: Run, name: str) -> Run:
    steered: dict[str, Any] = {"target": 0.4, "steer_every": 10}
    run = _at_budget(dense, name, RunLengthConfig(), learning_rate=2e-5, evaluate_every=0, **steered)
    return replace(run, teacher=run.model)


RECIPES: dict[str, Callable[[], Run]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        digits_dense,
        avit_tiny_imagenet,
        avit_small_imagenet,
        adavit_small_imagenet,
        adavit_t2t_19_imagenet,
        evit_small_imagenet,
        dynamicvit_small_imagenet,
        imagenette_dense,
        playground_dense,
        playground,
        imagenette_avit,
        imagenette_ats,
        imagenette_adavit,
        imagenette_evit,
        imagenette_dynamicvit,
        imagenette_tome,
        imagenette_merge,
        camvid_dense,
        camvid_merge,
        imagenette_calibrated,
        imagenette_exit,
        asl24_dense,
        asl24_runlength,
        hockey_dense,
        hockey_runlength,
    )
}
"""What `adaptvit train` knows by name."""
