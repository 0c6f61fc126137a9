"""Which models adaptvit takes: every one is built small, run and compared with itself; writes docs/families.md.

python benchmarks/families.py
"""

import argparse
import json
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import to_2tuple
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn
from tqdm import tqdm

from adaptvit import (
    AdaViTConfig,
    ATSConfig,
    AViTConfig,
    DynamicViTConfig,
    EViTConfig,
    FullConfig,
    GridConfig,
    Masked,
    MergeConfig,
    Packed,
    ToMeConfig,
)
from adaptvit.backbones.base import cores, family_of, input_size, pieces_of, read_slots
from adaptvit.backbones.families import FAMILIES, find, get
from adaptvit.backbones.fast import is_fast
from adaptvit.backbones.forward import scores
from adaptvit.methods import MethodConfig

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
RECORD = Path(__file__).with_name("rotary_merging.json")
"""What `rotary_merging.py` measured."""

MODULES = (
    *("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin", "vision_transformer_relpos", "eva", "beit"),
    *("naflexvit", "qwen3_vit", "deepseek_vit", "gemma4_vit", "vision_transformer_sam"),
    *("cait", "coat", "convit", "crossvit", "davit", "efficientformer_v2", "hiera", "hieradet_sam2", "levit", "mvitv2"),
    *("nest", "pit", "pvt_v2", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt"),
    *("twins", "volo", "xcit"),
)
"""timm's modules of vision transformers."""

STAGES = "the tokens are a grid that is pooled, cut into windows or convolved between stages, so that none may go"
LEFT_OUT = {
    "vision_transformer_sam": "attention goes by windows of the grid, whose padding is attended to",
    "cait": "attention mixes its heads around the softmax and is written out; the class token joins behind it",
    "convit": "attention is mixed with one by places and written out; the class token joins in the middle",
    "crossvit": "two branches of tokens of two sizes exchange their class tokens",
    "tnt": "every patch is itself a set of tokens, with attention of their own",
    "volo": "the first stage mixes neighbourhoods of the grid (outlook attention) and is then pooled",
    "xcit": "attention is between channels, and convolutions on the grid follow it",
    **dict.fromkeys(
        ("coat", "davit", "efficientformer_v2", "hiera", "hieradet_sam2", "levit", "mvitv2", "nest"), STAGES
    ),
    **dict.fromkeys(("pit", "pvt_v2", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"), STAGES),
    **dict.fromkeys(("tiny_vit", "twins"), STAGES),
}

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 4, "num_classes": 7}
STEM = VitCfg((16, 32, 64), (1, 1, 1), 16, VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), "1d")
REDUCTIONS: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | {"embed_cfg": STEM},
    SMALL | {"num_kv_heads": (4, 2)},
    SMALL | {"mlp_ratio": 4},
    {"depth": 2, "num_classes": 7},
    {},
)
"""Settings by which a model is made small; the first that its constructor takes are."""

VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}

VIDEO: dict[str, Any] = {"crop_size": 64, "frames_per_clip": 4, "num_pooler_layers": 1, "pred_num_hidden_layers": 1}

METHODS: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "A-ViT": AViTConfig(gate_scale=4.0, gate_center=2.0),
    "ATS": ATSConfig(blocks=(0, 1), rate=0.3),
    "EViT": EViTConfig(blocks=(0, 1), keep_rate=0.6),
    "DynamicViT": DynamicViTConfig(blocks=(0, 1)),
    "ToMe": ToMeConfig(r=2),
    "merging": MergeConfig(thresholds=0.3),
    "grid": GridConfig(rate=0.8),
    "AdaViT": AdaViTConfig(policies=("patches", "sublayers"), macs_target=None, initial_bias=0.3),
    "AdaViT, heads": AdaViTConfig(policies=("heads",), macs_target=None, initial_bias=0.3),
}
INTRODUCTION = """\
# Models that it takes

    python benchmarks/families.py  # writes this page

Of {names} vision transformers that timm {timm} has, {runs} run: {plain} as timm creates them, {needs} towers
of language models with one setting. So do the classes of transformers, open_clip and torchvision below. A model keeps
its own forward; only its blocks are called here, on the tokens that are left of each image. A model of transformers
attends by SDPA, or by `vit.set_attn_implementation("adaptvit")`, which is SDPA for any class of theirs.

| tier | blocks | what methods do inside of a block |
| --- | --- | --- |
| fast | timm's plain ones, by their maps | everything, heads too |
| split | parts by their names; attention is called as it is | everything between attention and MLP |
| whole | called as they are | nothing: they act when the block is through |

A ViT of your own, or of a package that is not here, is described by a row of names or guessed, and the guess proved:
[your_own_vit.md](your_own_vit.md).

Every model here was built with two narrow blocks, as far as its constructor takes that, with random weights of which
none is constant. **From the model** is the largest difference between `FullConfig().build(vit)` and the model's own
forward, of its largest value, in float32. **Layouts** is the same between packed and masked tokens, in float64, under a
method that drops some: merging, or ATS where that drops none; 1e-7 is where norms compute in float32 in any case.
"""

PIECES = """\
## Images of different shapes

    model({"patches": patches, "patch_coord": places, "patch_valid": valid})

`NaFlexVit` takes a batch of images of different shapes as timm's NaFlex loader gives it, beside tensors of images of
one shape; `Siglip2Vision` takes nothing else, as its processor gives it (`pixel_values`, `pixel_attention_mask`,
`spatial_shapes`). Slots that are not valid hold no token from the first block on: an image gives what it gives alone,
and keep rates, sampling points and merged tokens are of its own patches. `usage.grid` is then the room there was, (P,),
and `usage.patches` how much of it each image has; MACs and shares are of these.

Budgets are measured on a tensor of images of one shape (`adapt`, the commands). What needs such images says so:
AdaViT in training, `position="mean"` of merging, ATS that draws its points or is as released, random patches, and the
losses of A-ViT and DynamicViT as released.
"""

STRUCTURE = """\
One model of each structure ran with every method: *yes* is that packed and masked tokens agree, in logits and in what
they count, and *-* that the method refuses the model.
"""
METHODS_REFUSED = """\
AdaViT is in two columns: policies over patches and sub-layers, which need parts with names, and policies over heads,
which need timm's plain blocks. Merging on a grid (`grid`) takes images of one shape. A-ViT, ATS and EViT
score by the attention that tokens receive where no class token is read.
"""
NAMES = "Names of one module that run alike are in one row, with their largest differences.\n"
REFUSED = """\
What `build` says is about these models as they are, or made small where it goes by what they compute; a row of names
does not make them run.
"""
MERGING = "## Where a merged token is"
MERGED = """\
Under rotary positions the place of a merged token is a choice: that of the token that others joined (`receiver`), the
mean of its patches (`mean`), or that in a grid of fewer rows and columns, where only neighbours merge (`GridConfig`).
Two ViT-Tiny/16 were fine-tuned on Imagenette at 128 px from the same weights, one with DINOv3's rotation and one with
learned positions, {seeds}, and merged off the shelf, at shares of the dense MACs that were met on {fitting} training
images. Top-1 is of {images} validation images; divergence is that of the dense model's prediction, in nats. Each is the
mean over the models and, behind it, their standard deviation; differences are from the same model. Learned positions
are added to the features before the blocks, so that `receiver` and `mean` are the same.

Between `receiver`, which is the default, and `mean` these models tell no difference; merging on the grid diverges about
twice as far as ToMe, and `MergeConfig`, whose similarity is another and whose images keep what they need, half as far.

    B=benchmarks/rotary_merging.py
    python $B train --data imagenette160 --weights vit_tiny_patch16_224.safetensors --out rotary
    python $B compare --data imagenette160 --out rotary --limit {images}
    python benchmarks/families.py --merging
"""
WAYS = {"tome": "ToMe, even", "merge": "merging by similarity, even", "grid": "merging on the grid"}
AGREE = 1e-5
"""How far apart, of the largest value, results may be in float32 that are to be the same."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of one model."""

    name: str
    module: str
    kind: tuple[str, str, str, str] = ("", "", "", "")
    """Model, block and attention, positions, what is read of the last block."""
    tier: str | None = None
    """None where it is refused."""
    needs: str = ""
    """A setting that it is to be created with."""
    apart: float = 0.0
    """Largest difference from the model's own forward, of its largest value, in float32."""
    layouts: float = 0.0
    """The same between packed and masked tokens, of a method that drops some, in float64."""
    said: str = ""
    """With which sentence it is refused."""
    vit: nn.Module | None = field(default=None, repr=False, compare=False)


def names_of_timm() -> list[tuple[str, str]]:
    """Modules and the names of the models in them."""
    return [(module, name) for module in MODULES for name in timm.list_models(module=module)]


def classes() -> list[str]:
    """Qualified names of the classes that are known, without timm's, whose models have names."""
    return [name for name in FAMILIES.models if not name.startswith("timm.")]


def taken(make: Callable[..., nn.Module], settings: dict[str, Any]) -> nn.Module:
    """A model with those of the settings that it knows."""
    while True:
        try:
            return make(**settings)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in settings:
                raise
            settings = {name: value for name, value in settings.items() if name != unknown[1]}


def small(name: str, **settings: Any) -> nn.Module:
    """A timm model of this name with two narrow blocks and few patches, as far as its constructor takes that."""
    patch = re.search(r"patch(\d+)", name)
    size = 4 * int(patch[1]) if patch else 128
    failed: Exception | None = None
    for reduction in REDUCTIONS:
        try:
            return taken(partial(timm.create_model, name), reduction | {"img_size": size} | settings)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            failed = error
    raise RuntimeError(f"{name} could not be created") from failed


def small_class(name: str) -> nn.Module:
    """A small model of a class by its qualified name.

    Raises:
        ImportError: its library is not installed.
    """
    module, _, kind = name.rpartition(".")
    made = getattr(import_module(module), kind)
    if name.startswith("transformers."):
        config = made.config_class
        if "vision_config" in config.sub_configs:
            return made(config(vision_config=VISION, num_labels=7))
        return made(config(**VISION, **VIDEO, num_labels=7, mlp_ratio=2, vocab_size=8, num_register_tokens=4))
    if name.startswith("torchvision."):
        return made(64, 16, 2, 4, 64, 96, num_classes=7)
    if name.startswith("open_clip."):
        return made(64, 16, 64, 2, 4, 2.0, output_dim=32)
    return timm.create_model("parts_vit", **SMALL, img_size=64)


def vary(vit: nn.Module) -> nn.Module:
    """Give a model parameters of which each has a part in what it computes: none is constant, and tokens differ."""
    generator = torch.Generator().manual_seed(0)
    for weight in vit.parameters():
        centre = weight.mean().item() if weight.ndim < 2 and weight.mean() == 1 else 0.0
        spread = 0.2 if weight.ndim < 2 else min(0.5, 1.5 / max(weight[0].numel(), 1) ** 0.5)
        nn.init.normal_(weight, centre, spread, generator=generator)
    return vit.eval()


def pictures(vit: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """Two images of unlike contrast, of the model's size, or of six by six patches where it takes any.

    Where it takes images in pieces alone, as SigLIP 2 does, six by six patches and four by five.
    """
    channels, *size = input_size(vit)
    if family_of(vit).any_size is True:
        size = [6 * side for side in to_2tuple(get(vit, family_of(vit).patch))]
    frames = find(vit, family_of(vit).frames)
    shape = (channels, *size) if frames is None else (frames, channels, *size)
    contrasts = torch.tensor([1.5, 0.4]).view(2, *[1] * len(shape))
    images = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)) * contrasts).to(dtype)
    if pieces_of(vit, images) is None:
        return images
    cut = images.unflatten(2, (6, -1)).unflatten(4, (6, -1)).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": cut.flatten(3).flatten(1, 2),
        "pixel_attention_mask": (torch.arange(36) < torch.tensor([[36], [20]])).long(),
        "spatial_shapes": torch.tensor([[6, 6], [4, 5]]),
    }


def given(vit: nn.Module, images: Any) -> Tensor:
    """What a model itself makes of images."""
    pieces = pieces_of(vit, images)
    return scores(vit(**images) if pieces is not None and pieces.alone else vit(images))[0]


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest value; infinite where that is no number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).nan_to_num(nan=float("inf")).item()


def tier(vit: nn.Module) -> str:
    """How the blocks of a model run."""
    if all(map(is_fast, cores(vit))):
        return "fast"
    return "split" if all(FAMILIES.parts_of(block) is not None for block in cores(vit)) else "whole"


def kind(vit: nn.Module) -> tuple[str, str, str, str]:
    """How a model is put together: model, block and attention, positions, what is read of the last block."""
    family, (block, *_) = family_of(vit), cores(vit)
    parts = FAMILIES.parts_of(block)
    attention = find(block, parts.attention if parts else "attn")
    tables = ("rope", "rotary_emb", "encoder.rope", "encoder.rotary_emb", "rope_embeddings", "model.rope_embeddings")
    rows = [*(find(vit, name) for name in tables), find(attention, "rel_pos"), find(vit, "shared_rel_pos")]
    positions = next((type(row).__name__ for row in rows if isinstance(row, nn.Module)), "added before the blocks")
    if find(attention, "relative_position_bias_table") is not None:
        positions = "relative_position_bias_table"
    if "places" in family.tables.values():
        positions = "turned by numbers of patches"
    count = read_slots(vit)
    pooled = "all tokens" if find(vit, family.pool) is None else "attention pool"
    read = pooled if count is None else "class token" if count == 1 else f"{count} tokens"
    inside = type(block).__name__ + (f" of {type(attention).__name__}" if attention is not None else "")
    return type(vit).__name__, inside, positions, read


def refusal(vit: nn.Module) -> str:
    """The sentence with which a model is refused; empty where it is not."""
    try:
        FullConfig().build(vit)
    except TypeError as error:
        return str(error)
    return ""


class Agreement(NamedTuple):
    """Of packed and masked tokens under a method, in float64."""

    apart: float
    """Of the largest value; infinite where they differ in what they count."""
    drops: bool
    """Whether any image had less than all its compute."""

    @property
    def holds(self) -> bool:
        return self.apart < AGREE


@torch.no_grad()
def agreement(config: MethodConfig, vit: nn.Module) -> Agreement | None:
    """How packed and masked tokens agree under a method, on a model in float64; None where that refuses it."""
    torch.manual_seed(0)
    try:
        model = config.build(vit).eval().double()
    except TypeError:
        return None
    images = pictures(vit, torch.float64)
    try:
        packed, masked = (model(images, layout, detailed=True) for layout in (Packed, Masked))
    except NotImplementedError:  # images of different shapes
        return None
    near = apart(packed.logits, masked.logits) if packed.usage == masked.usage else float("inf")
    return Agreement(near, bool((packed.usage.share < 1).any()))


@torch.no_grad()
def measured(found: Found, vit: nn.Module) -> Found:
    """What is found of a model that is not refused."""
    vit = vary(vit)
    images = pictures(vit)
    near = apart(FullConfig().build(vit)(images), given(vit, images))
    vit = vit.double()
    tried = (agreement(METHODS[method], vit) for method in ("merging", "ATS", "EViT"))
    layouts = next(one for one in tried if one is not None and one.drops)
    return replace(found, kind=kind(vit), tier=tier(vit), apart=near, layouts=layouts.apart, vit=vit)


def examine(module: str, name: str) -> Found:
    """What becomes of a timm model."""
    found = Found(name=name, module=module)
    if LEFT_OUT.get(module) and module != "vision_transformer_sam":  # as large as it is, without its numbers
        said = refusal(timm.create_model(name, device="meta"))
        if re.search("has no |does not say|has blocks that take|tokens of", said):  # by its parts and shapes
            return replace(found, said=said)
    vit = small(name)
    said = refusal(vit)
    if setting := re.search(r"create it with (\w+)='(\w*)'", said):
        vit = small(name, **{setting[1]: setting[2]})
        return measured(replace(found, said=said, needs=f"{setting[1]}={setting[2]!r}"), vit)
    return replace(found, said=said) if said else measured(found, vit)


def examine_class(name: str) -> Found:
    """What becomes of a model of a class."""
    library = name.partition(".")[0]
    found = Found(name=name, module=library)
    try:
        vit = small_class(name)
    except ImportError:
        return replace(found, said=f"not tried: {library} is not installed")
    said = refusal(vit)
    return replace(found, said=said) if said else measured(found, vit)


Rows = dict[tuple[str, ...], Agreement | None]
"""By module or library, kind, tier and method."""


def examined(quiet: bool = False) -> tuple[list[Found], Rows]:
    """What becomes of all models, and of every method on the first of each kind."""
    tasks = [partial(examine, module, name) for module, name in names_of_timm()]
    tasks += [partial(examine_class, name) for name in classes()]
    every, rows = list[Found](), Rows()
    for task in tqdm(tasks, desc="models", disable=quiet):
        found = task()
        every.append(replace(found, vit=None))
        key = (found.module, *found.kind, str(found.tier))
        if found.vit is not None and (*key, "full") not in rows:
            rows |= {(*key, name): agreement(config, found.vit) for name, config in METHODS.items()}
    return every, rows


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a table, and an empty one."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(map(str, line))} |" for line in lines), ""]


def listed(names: Iterable[str]) -> str:
    """Names in a cell."""
    return ", ".join(f"`{name}`" for name in names)


def worst(values: Iterable[float]) -> str:
    """The largest, with one digit."""
    largest = max(values, default=0.0)
    return f"{largest:.0e}" if largest else "0"


def grouped(every: Iterable[Found], by: Callable[[Found], Any]) -> list[tuple[Any, list[Found]]]:
    """In the order in which the first of a group comes."""
    groups: dict[Any, list[Found]] = {}
    for found in every:
        groups.setdefault(by(found), []).append(found)
    return list(groups.items())


def verdict(found: Found) -> str:
    """Tier, and the setting that is needed."""
    return f"{found.tier}, with `{found.needs}`" if found.needs else str(found.tier)


def sentence(found: Found) -> str:
    """That of a refusal, without what it says of the model's name."""
    return re.sub("^.*?(of no family that is known, and |is not supported: )", "", found.said).splitlines()[0]


def page(every: list[Found], rows: Rows) -> str:
    """The page."""
    timms = [found for found in every if found.module in MODULES]
    others = [found for found in every if found.module not in MODULES]
    runs = [found for found in timms if found.tier]
    plain = [found for found in runs if not found.needs]
    lines = [
        INTRODUCTION.format(
            runs=len(runs), names=len(timms), plain=len(plain), needs=len(runs) - len(plain), timm=timm.__version__
        )
    ]

    lines += [PIECES, "## By module", ""]
    counts = []
    for module, some in [*grouped(timms, lambda found: found.module), ("all", timms)]:
        ran = [found for found in some if found.tier]
        tiers = [sum(found.tier == name for found in ran) or "" for name in ("fast", "split", "whole")]
        near = [worst(found.apart for found in ran), worst(found.layouts for found in ran)] if ran else ["", ""]
        counts.append([module, len(some), len(ran) or "", *tiers, *near])
    lines += table(["module of timm", "names", "run", "fast", "split", "whole", "from the model", "layouts"], counts)

    lines += ["## By structure", "", STRUCTURE]
    kinds = grouped([found for found in every if found.tier], lambda found: (found.module, *found.kind, found.tier))
    head = ["structure", "block", "positions", "reads", "tier", "models", "such as", *METHODS]
    body = []
    for (module, model, block, positions, read, name), some in kinds:
        key = (module, model, block, positions, read, name)
        marks = [mark(rows[(*key, method)]) for method in METHODS]
        such = some[0].name.rpartition(".")[2]
        body.append([f"{model} ({module})", block, positions, read, name, len(some), f"`{such}`", *marks])
    lines += [*table(head, body), METHODS_REFUSED]

    lines += ["## Names that run", "", NAMES]
    for module, some in grouped(runs, lambda found: found.module):
        groups = grouped(some, lambda found: (verdict(found), found.kind[3]))
        body = [[listed(found.name for found in like), *key, *differences(like)] for key, like in groups]
        lines += [f"### {module}", "", *table(["names", "tier", "reads", "from the model", "layouts"], body)]

    lines += ["## Classes", ""]
    body = []
    for found in others:
        module, _, name = found.name.rpartition(".")
        cells = [verdict(found), found.kind[3], *differences([found])] if found.tier else ["-"] * 4
        body.append([f"`{name}`", f"`{module}`", *cells])
    lines += table(["class", "module", "tier", "reads", "from the model", "layouts"], body)
    for said, some in grouped([found for found in others if not found.tier], sentence):
        lines += [f"{listed(found.name.rpartition('.')[2] for found in some)}: {said}", ""]

    lines += ["## Names that are left out", "", REFUSED]
    body = []
    for module, some in grouped([found for found in timms if not found.tier], lambda found: found.module):
        for _, like in grouped(some, lambda found: re.sub(r"\d+", "", sentence(found))):
            body.append([module, listed(found.name for found in like), LEFT_OUT[module], sentence(like[0])])
    lines += table(["module", "names", "why", "`build` says"], body)
    return with_merging("\n".join(lines))


def with_merging(text: str) -> str:
    """The page with what is recorded of merging at its end."""
    text = text.split(f"\n{MERGING}\n")[0].rstrip() + "\n"
    return text + "\n" + merging(json.loads(RECORD.read_text())) if RECORD.exists() else text


def merging(record: dict[str, Any]) -> str:
    """The section on what `rotary_merging.py` measured."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(record["rows"], key=lambda row: (row["positions"] != "rotary", -row["target"])):
        groups.setdefault((row["positions"], row["target"], row["method"], row["position"]), []).append(row)
    body = []
    for (positions, target, method, position), rows in groups.items():
        where = position if positions == "rotary" else "in the features"
        measured = [
            spread((100 * row["top1"] for row in rows), ".1f"),
            spread((100 * (row["top1"] - row["dense"]) for row in rows), "+.1f"),
            spread((row["divergence"] for row in rows), ".3f"),
        ]
        share = mean(row["share"] for row in rows)
        body.append([positions, f"{target:.0%}", WAYS[method], where or "in the grid", f"{share:.1%}", *measured])
    seeds = len({row["seed"] for row in record["rows"]})
    told = MERGED.format(seeds=f"{seeds} seeds each" if seeds > 1 else "once", **record["conditions"])
    head = ["positions", "budget", "method", "a merged token is", "MACs", "top-1, %", "less dense", "divergence"]
    return "\n".join([MERGING, "", told, *table(head, body)]).rstrip() + "\n"


def spread(values: Iterable[float], digits: str) -> str:
    """Mean and standard deviation."""
    values = list(values)
    return f"{mean(values):{digits}}" + (f" ± {stdev(values):{digits.strip('+')}}" if len(values) > 1 else "")


def mark(found: Agreement | None) -> str:
    """How a method does."""
    if found is None:
        return "-"
    return "yes" if found.holds else f"{found.apart:.0e} apart"


def differences(some: list[Found]) -> tuple[str, str]:
    """The largest from the models' own forwards, and between layouts."""
    return worst(found.apart for found in some), worst(found.layouts for found in some)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Write docs/families.md")
    parser.add_argument("--only", nargs="*", help="print what becomes of these timm names, and write nothing")
    parser.add_argument("--merging", action="store_true", help="write the section on merging alone, from its record")
    arguments = parser.parse_args()
    if arguments.merging:
        PAGE.write_text(with_merging(PAGE.read_text()))
        return
    warnings.filterwarnings("ignore")
    if arguments.only:
        for module, name in names_of_timm():
            if name in arguments.only:
                print(replace(examine(module, name), vit=None))
        return
    PAGE.write_text(page(*examined()))


if __name__ == "__main__":
    main()
