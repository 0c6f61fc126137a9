"""How the ViTs that are known are put together: names of their parts, and no code.

A family that is not here is added by a row of its own, from whatever package, with `FAMILIES.register`; one that nobody
has described is guessed, and the guess proved (`adaptvit.backbones.guess`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

Table = Literal["sin cos", "cos, sin", "each", "places"]
"""How a block is told positions: `sin cos`, one tensor (..., P, 2d) of sines and then cosines; `cos, sin`, two tensors
(..., P, d); `each`, one tensor (B, N, d) with a row for each token; `places`, the numbers of patches (B, N), or nothing
where all are in order."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A block of two steps, each x + out(body(into(x))), by the names of its parts; dots lead inwards.

    What a name leads to is called, or multiplied by where it is a number or parameter, or passed over where it is None.
    """

    into_attention: tuple[str, ...] = ("norm1",)
    attention: str = "attn"
    out_of_attention: tuple[str, ...] = ("ls1", "drop_path1")
    into_mlp: tuple[str, ...] = ("norm2",)
    mlp: tuple[str, ...] = ("mlp",)
    out_of_mlp: tuple[str, ...] = ("ls2", "drop_path2")
    heads: str = "attn.num_heads"
    head_dim: str | None = "attn.head_dim"
    """None is the width of a token shared by the heads."""
    attends_once: bool = True
    """Whether attention is one product of queries and keys, of `head_dim` channels in each of the heads."""
    bias: str | None = None
    """What makes a relative bias of its own, whatever tokens there are: `get_bias()`."""
    unturned: str | None = None
    """Attribute of the attention with the number of leading tokens that it does not rotate."""
    asked: bool = False
    """Whether the block makes some of what it tells its attention, so that its own forward is asked for that."""


class Reads(NamedTuple):
    """How many leading tokens are read, which something of the model says; None where all are pooled."""

    name: str
    cases: Mapping[Any, "int | Reads | None"]
    other: int | None
    """In all other cases."""


BY_GLOBAL_POOL = Reads("global_pool", {"token": 1}, None)
"""As timm's models say it."""


class Refused(NamedTuple):
    """What a model of the family is refused for."""

    name: str
    why: str
    value: Any = True
    """True is anything but None and what is false."""


class Pieces(NamedTuple):
    """Images of different shapes in one batch, cut into P patches each: a dict, by its names."""

    patches: str
    """(B, P, channels of a patch)."""
    valid: str
    """(B, P), true or 1 of the patches that there are, which come first."""
    others: tuple[str, ...]
    """What else is in it."""
    mask: str
    """Argument of a block that hides the others."""
    alone: bool = False
    """Whether the model takes nothing else, item by item by these names; else it takes the dict too."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of models; dotted names lead from the model to what is asked for."""

    models: tuple[str, ...]
    """Qualified names of the classes."""
    blocks: str = "blocks"
    """The list of blocks."""
    norm: str | None = "norm"
    """What all tokens go through after the last block, one by one."""
    pool: str | None = "attn_pool"
    """What pools all tokens by attention, where the model has it."""
    tables: Mapping[str, Table] = field(default_factory=lambda: {"rope": "sin cos"})
    """Arguments of a block that say where tokens are."""
    bias: str | None = None
    """What makes a relative bias for all blocks: `get_bias()`."""
    prefix: tuple[int | str, ...] = ("num_prefix_tokens",)
    """Tokens before the patches: the sum of these."""
    pools_prefix: str | bool = "pool_include_prefix"
    """Whether those are pooled too."""
    reads: int | Reads | None = BY_GLOBAL_POOL
    """Leading tokens that are read of the last block; None where all are pooled."""
    stem: str | None = "patch_embed"
    """What makes tokens of patches; None where its MACs are those of all that runs before the blocks."""
    weighed: str | None = None
    """Table of positions that every patch is given a weighted mean of, by a product with all of it."""
    channels: str = "in_chans"
    size: str | None = "patch_embed.img_size"
    """Of images; None where the model has none: then timm's record may say it."""
    any_size: str | bool = "dynamic_img_size"
    """Whether images of other sizes are taken."""
    patch: str = "patch_embed.patch_size"
    frames: str | None = None
    """Frames of videos (batch, frames, channels, height, width), which the model takes then in the place of images."""
    tubelet: str | None = None
    """Frames that a patch has."""
    width: str = "embed_dim"
    classes: str | int = "num_classes"
    heads: tuple[str, ...] = ("head", "head_dist")
    """Classifiers."""
    map_head: str | None = None
    """What is read in the place of a classifier's tokens: a head on the map of all patches, or a projector that takes
    neighbours together; None, or a part that is not there, is none."""
    checkpointing: str = "grad_checkpointing"
    """What says whether its blocks are to be run again for the gradients."""
    pieces: Pieces | None = None
    """How images of different shapes are given; None where they cannot be."""
    tuples: bool = False
    """Whether a block gives a tuple, of which the first is read."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What a forward is called with beside images."""
    prepared: Mapping[str, Any] = field(default_factory=dict)
    """How images are prepared, as timm's records have it, where nothing else says it."""
    needs_grid: bool = False
    """Whether as many slots as there were are needed after the last block."""
    refused: tuple[Refused, ...] = ()


qualified: Callable[[Any], str] = cache(lambda kind: f"{kind.__module__}.{kind.__qualname__}")
"""A class's name with its module's; every block of a forward is asked for it."""


def _names_of(forward: Any, attn: Any) -> tuple[str, str]:
    """What the parts of a block are kept under, by its forward, and by that and its attention's class."""
    name = f"{forward.__module__}.{forward.__qualname__}".removesuffix(".forward")
    return name, f"{name} with {qualified(attn)}"


class Families:
    """Families by the classes of their models, and parts by the classes whose forward a block has."""

    def __init__(self, families: tuple[Family, ...], parts: Mapping[str, Parts]) -> None:
        self._families = {name: family for family in families for name in family.models}
        self._parts = dict(parts)
        self._guessed: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()

    def keep(self, vit: nn.Module, family: Family) -> None:
        """Note the family that was guessed of one model."""
        self._guessed[vit] = family

    def drop(self, vit: nn.Module) -> None:
        """Forget it again."""
        self._guessed.pop(vit, None)

    def register(self, family: Family, parts: Mapping[str, Parts] | None = None) -> None:
        """Make a family known in this process.

        Args:
            parts: of its blocks, by the qualified names of their classes, with that of their attention's where it
                matters: "package.Block with package.Attention".
        """
        self._families |= dict.fromkeys(family.models, family)
        self._parts |= parts or {}

    @property
    def models(self) -> tuple[str, ...]:
        """Qualified names of the classes of models."""
        return tuple(self._families)

    def __iter__(self) -> Iterator[Family]:
        return iter({id(family): family for family in self._families.values()}.values())

    def of(self, vit: nn.Module) -> Family | None:
        """The family of a model: its own `family`, or by a class that it has or derives from, or as guessed."""
        if isinstance(own := vars(vit).get("family"), Family):
            return own
        for kind in type(vit).__mro__:
            if family := self._families.get(qualified(kind)):
                return family
        return self._guessed.get(vit)

    def parts_of(self, block: nn.Module) -> Parts | None:
        """The parts of a block, by where its forward is written: a class that writes its own is another's."""
        name, with_attention = _known_names_of(type(block).forward, type(getattr(block, "attn", None)))
        special = self._parts.get(with_attention)
        return self._parts.get(name) if special is None else special


def get(module: nn.Module, name: str) -> Any:
    """An attribute by its dotted name."""
    return _getter(name)(module)


_getter = cache(attrgetter)
_known_names_of: Callable[[Any, Any], tuple[str, str]] = cache(_names_of)


def find(module: nn.Module, name: str | None) -> Any:
    """The same, None where there is none."""
    try:
        return None if name is None else get(module, name)
    except AttributeError:
        return None


def value_of(module: nn.Module, name: str | int) -> Any:
    """The same of what may be a value itself."""
    return get(module, name) if isinstance(name, str) else name


_EVA = Parts(
    out_of_attention=("gamma_1", "drop_path1"), out_of_mlp=("gamma_2", "drop_path2"), unturned="num_prefix_tokens"
)
_POST = Parts(
    into_attention=(), out_of_attention=("norm1", "drop_path1"), into_mlp=(), out_of_mlp=("norm2", "drop_path2")
)

_HALF: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CLIPS: dict[str, Any] = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_SQUASHED: dict[str, Any] = {"crop_mode": "squash", "crop_pct": 1.0}
_CROPPED: dict[str, Any] = {"crop_mode": "center", "crop_pct": 0.875, "interpolation": "bicubic"}

_HF = partial(
    Family,
    norm="layernorm",
    pool=None,
    tables={},
    prefix=(1,),
    pools_prefix=False,
    reads=1,
    channels="config.num_channels",
    size="config.image_size",
    any_size=False,
    patch="config.patch_size",
    width="config.hidden_size",
    classes=0,
    heads=(),
    told={"return_dict": True, "output_hidden_states": False, "output_attentions": False},
)
"""Hugging Face's transformers; a row for the model alone, and one for it inside of a classifier."""


_PATHS = (
    "blocks",
    "norm",
    "pool",
    "stem",
    "weighed",
    "channels",
    "size",
    "patch",
    "width",
    "checkpointing",
    "frames",
    "tubelet",
    "map_head",
)


def inside(root: str, family: Family, **others: Any) -> Family:
    """The row of a module that has a model of a family as its `root`, whose attributes all names lead to then."""

    def led(value: Any) -> Any:
        if isinstance(value, Reads):
            cases = {case: led(read) for case, read in value.cases.items()}
            return Reads(f"{root}.{value.name}", cases, led(value.other))
        return f"{root}.{value}" if isinstance(value, str) else value

    names = (*_PATHS, "bias", "pools_prefix", "reads", "any_size", "classes")
    return replace(
        family,
        models=(),
        prefix=tuple(led(part) for part in family.prefix),
        heads=tuple(led(head) for head in family.heads),
        refused=tuple(one._replace(name=led(one.name)) for one in family.refused),
        **{name: led(getattr(family, name)) for name in names} | others,
    )


def _with_head(root: str, family: Family, *models: str, **others: Any) -> Family:
    """The family of the models that have one of these as `root`, and a head on it."""
    names: dict[str, Any] = {name: f"{root}.{old}" for name in _PATHS if (old := getattr(family, name)) is not None}
    given = {"classes": "num_labels", "heads": ("classifier",)} | others
    return replace(family, models=models, **names | given)


_TRANSFORMERS = "transformers.models."
_VIT = _HF(
    models=(f"{_TRANSFORMERS}vit.modeling_vit.ViTModel",),
    blocks="layers",
    checkpointing="layers.0.gradient_checkpointing",
    reads=Reads("pooler", {None: None}, 1),
    heads=("pooler",),
    stem="embeddings.patch_embeddings.projection",
    prepared=_HALF | _SQUASHED | {"interpolation": "bilinear"},
)
_DEIT = replace(
    _VIT,
    models=(f"{_TRANSFORMERS}deit.modeling_deit.DeiTModel",),
    prefix=(2,),
    prepared=_IMAGENET | _SQUASHED | {"crop_pct": 0.875, "interpolation": "bicubic"},
)
_IJEPA = replace(_VIT, models=(f"{_TRANSFORMERS}ijepa.modeling_ijepa.IJepaModel",), prefix=(), reads=None)
_BEIT = replace(
    _VIT,
    models=(f"{_TRANSFORMERS}beit.modeling_beit.BeitModel",),
    reads=Reads("config.use_mean_pooling", {False: 1}, None),
    any_size=True,
    prepared=_HALF | _SQUASHED | {"interpolation": "bicubic"},
)
_DINO = _HF(
    models=(f"{_TRANSFORMERS}dinov2.modeling_dinov2.Dinov2Model",),
    blocks="encoder.layer",
    checkpointing="encoder.layer.0.gradient_checkpointing",
    stem="embeddings.patch_embeddings.projection",
    any_size=True,
    prepared=_IMAGENET | _CROPPED,
)
_DINO_REGISTERS = replace(
    _DINO,
    models=(f"{_TRANSFORMERS}dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",),
    prefix=(1, "config.num_register_tokens"),
)
_SIGLIP = _HF(
    models=(f"{_TRANSFORMERS}siglip.modeling_siglip.SiglipVisionModel",),
    blocks="encoder.layers",
    checkpointing="encoder.layers.0.gradient_checkpointing",
    norm="post_layernorm",
    pool="head",
    prefix=(),
    reads=None,
    stem="embeddings.patch_embedding",
    prepared=_HALF | _SQUASHED | {"interpolation": "bicubic"},
)
_SIGLIP2 = replace(
    _SIGLIP,
    models=(f"{_TRANSFORMERS}siglip2.modeling_siglip2.Siglip2VisionModel",),
    weighed="embeddings.position_embedding.weight",
    size=None,
    any_size=True,
    pieces=Pieces("pixel_values", "pixel_attention_mask", ("spatial_shapes",), "attention_mask", alone=True),
)
_CLIP = replace(
    _SIGLIP,
    models=(f"{_TRANSFORMERS}clip.modeling_clip.CLIPVisionModel",),
    norm=None,
    pool=None,
    prefix=(1,),
    reads=1,
    prepared=_CLIPS | _CROPPED | {"crop_pct": 1.0},
)
_AIM = replace(
    _SIGLIP,
    models=(f"{_TRANSFORMERS}aimv2.modeling_aimv2.Aimv2VisionModel",),
    norm="rms_norm",
    any_size="config.is_native",
    stem="embeddings.patch_embed",
    prepared=_CLIPS | _CROPPED | {"crop_pct": 1.0},
)
_VIDEOMAE = replace(
    _DINO,
    models=(f"{_TRANSFORMERS}videomae.modeling_videomae.VideoMAEModel",),
    prefix=(),
    reads=None,
    any_size=False,
    frames="config.num_frames",
    tubelet="config.tubelet_size",
    prepared=_IMAGENET | _CROPPED | {"crop_pct": 1.0, "interpolation": "bilinear"},
)
_VJEPA = replace(
    _VIDEOMAE,
    models=(f"{_TRANSFORMERS}vjepa2.modeling_vjepa2.VJEPA2Model",),
    checkpointing="encoder.layer.0.gradient_checkpointing",
    norm="encoder.layernorm",
    tables={"position_mask": "places"},
    stem="encoder.embeddings.patch_embeddings.proj",
    channels="config.in_chans",
    size="config.crop_size",
    frames="config.frames_per_clip",
    tuples=True,
    told=dict(_VIDEOMAE.told) | {"skip_predictor": True},
)
_VIT_LAYER = Parts(
    into_attention=("layernorm_before",),
    attention="attention",
    out_of_attention=("dropout",),
    into_mlp=("layernorm_after",),
    out_of_mlp=("dropout",),
    heads="attention.num_attention_heads",
    head_dim="attention.head_dim",
)
_DINO_LAYER = Parts(
    attention="attention",
    out_of_attention=("layer_scale1", "drop_path"),
    out_of_mlp=("layer_scale2", "drop_path"),
    heads="attention.num_attention_heads",
    head_dim="attention.head_dim",
)
_SIGLIP_LAYER = Parts(
    into_attention=("layer_norm1",),
    attention="self_attn",
    out_of_attention=(),
    into_mlp=("layer_norm2",),
    out_of_mlp=(),
    heads="self_attn.num_heads",
    head_dim="self_attn.head_dim",
)

_CLIP_BLOCK = Parts(
    into_attention=("ln_1",),
    out_of_attention=("ls_1",),
    into_mlp=("ln_2",),
    out_of_mlp=("ls_2",),
    head_dim=None,
    asked=True,
)
_GRID = "takes tokens by their places in the grid, so that none may go: create it with"
_QWEN = Family(
    models=("timm.models.qwen3_vit.Qwen3VitEncoder",),
    norm=None,
    pool=None,
    prefix=(),
    pools_prefix=False,
    reads=None,
    any_size=True,
    needs_grid=True,
    map_head="merger",
)
_DEEPSEEK = replace(_QWEN, models=("timm.models.deepseek_vit.DeepseekVitEncoder",), norm="norm", map_head="aligner")
_GEMMA = replace(
    _QWEN,
    models=("timm.models.gemma4_vit.Gemma4VitEncoder",),
    tables={"rope_cos": "each", "rope_sin": "each"},
    stem=None,
    size=None,
    patch="patch_size",
    map_head=None,
    refused=(Refused("global_pool", f"its pooler {_GRID} global_pool='avg'", "soft"),),
)


def _classifier(family: Family) -> Family:
    """The family of a tower's classifier."""
    refused = (
        one._replace(name=f"encoder.{one.name}", why=one.why.replace("global_pool='avg'", "encoder_pool=''"))
        for one in family.refused
    )
    return replace(
        _with_head("encoder", family, family.models[0].replace("Encoder", "Classifier"), channels="in_chans"),
        classes="num_classes",
        heads=("head",),
        refused=tuple(refused),
    )


FAMILIES = Families(
    (
        Family(
            models=(
                "timm.models.vision_transformer.VisionTransformer",
                "adaptvit.backbones.parts.PartsViT",
            ),
        ),
        Family(models=("timm.models.deit.VisionTransformerDistilled",), reads=2),
        Family(models=("timm.models.eva.Eva",), pools_prefix="attn_pool"),
        Family(models=("timm.models.beit.Beit",), pools_prefix=False),
        Family(
            models=("timm.models.vision_transformer_relpos.VisionTransformerRelPos",),
            pools_prefix=False,
            bias="shared_rel_pos",
        ),
        Family(
            models=("timm.models.naflexvit.NaFlexVit",),
            stem="embeds.proj",
            size=None,
            any_size=True,
            patch="embeds.patch_size",
            pieces=Pieces("patches", "patch_valid", ("patch_coord",), "attn_mask"),
        ),
        *(one for family in (_QWEN, _DEEPSEEK, _GEMMA) for one in (family, _classifier(family))),
        Family(
            models=("timm.models.vision_transformer_sam.VisionTransformerSAM",),
            refused=(
                Refused(
                    "blocks",
                    "its attention goes by windows of the grid, with padding that is attended to and a bias of each "
                    "query, so that it has no tokens to drop",
                ),
            ),
        ),
        Family(
            models=("torchvision.models.vision_transformer.VisionTransformer",),
            blocks="encoder.layers",
            norm="encoder.ln",
            prefix=(1,),
            reads=1,
            stem="conv_proj",
            channels="conv_proj.in_channels",
            size="image_size",
            patch="patch_size",
            width="hidden_dim",
            heads=("heads",),
            prepared=_IMAGENET | _CROPPED | {"interpolation": "bilinear"},
        ),
        Family(
            models=("open_clip.transformer.VisionTransformer",),
            blocks="transformer.resblocks",
            norm="ln_post",
            tables={},
            prefix=(1,),
            pools_prefix="attn_pool",
            reads=Reads("attn_pool", {None: Reads("pool_type", {"tok": 1}, None)}, None),
            stem="conv1",
            channels="conv1.in_channels",
            size="image_size",
            patch="patch_size",
            width="transformer.width",
            classes=0,
            heads=("proj",),
            prepared=_CLIPS | _CROPPED | {"crop_pct": 1.0},
            checkpointing="transformer.grad_checkpointing",
            refused=(
                Refused("output_tokens", "it gives tokens beside features: set output_tokens to False"),
                Refused("attn_pool_contrastive", "it pools twice: create it with attentional_pool=True"),
            ),
        ),
        _VIT,
        _with_head("vit", _VIT, f"{_TRANSFORMERS}vit.modeling_vit.ViTForImageClassification", reads=1),
        _DEIT,
        _with_head("deit", _DEIT, f"{_TRANSFORMERS}deit.modeling_deit.DeiTForImageClassification", reads=1),
        _with_head(
            "deit",
            _DEIT,
            f"{_TRANSFORMERS}deit.modeling_deit.DeiTForImageClassificationWithTeacher",
            reads=2,
            heads=("cls_classifier", "distillation_classifier"),
        ),
        _IJEPA,
        _with_head("ijepa", _IJEPA, f"{_TRANSFORMERS}ijepa.modeling_ijepa.IJepaForImageClassification"),
        _BEIT,
        _with_head("beit", _BEIT, f"{_TRANSFORMERS}beit.modeling_beit.BeitForImageClassification"),
        _DINO,
        _with_head("dinov2", _DINO, f"{_TRANSFORMERS}dinov2.modeling_dinov2.Dinov2ForImageClassification", reads=None),
        _DINO_REGISTERS,
        _with_head(
            "dinov2_with_registers",
            _DINO_REGISTERS,
            _DINO_REGISTERS.models[0].replace("RegistersModel", "RegistersForImageClassification"),
            reads=None,
        ),
        replace(
            _DINO_REGISTERS,
            models=(f"{_TRANSFORMERS}dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel",),
            blocks="model.layer",
            checkpointing="model.layer.0.gradient_checkpointing",
            norm="norm",
            tables={"position_embeddings": "cos, sin"},
            stem="embeddings.patch_embeddings",
            prepared=_IMAGENET | _SQUASHED | {"interpolation": "bilinear"},
        ),
        _SIGLIP,
        _with_head("vision_model", _SIGLIP, f"{_TRANSFORMERS}siglip.modeling_siglip.SiglipForImageClassification"),
        _SIGLIP2,
        _with_head("vision_model", _SIGLIP2, _SIGLIP2.models[0].replace("VisionModel", "ForImageClassification")),
        _CLIP,
        _with_head(
            "vision_model",
            _CLIP,
            f"{_TRANSFORMERS}clip.modeling_clip.CLIPVisionModelWithProjection",
            classes=0,
            heads=("visual_projection",),
        ),
        _with_head("vision_model", _CLIP, f"{_TRANSFORMERS}clip.modeling_clip.CLIPForImageClassification", reads=None),
        _AIM,
        _VIDEOMAE,
        _with_head(
            "videomae",
            _VIDEOMAE,
            f"{_TRANSFORMERS}videomae.modeling_videomae.VideoMAEForVideoClassification",
            refused=(
                Refused(
                    "config.use_mean_pooling",
                    "it reads the first patch alone, which may be dropped: create it with use_mean_pooling=True",
                    False,
                ),
            ),
        ),
        _VJEPA,
        _with_head(
            "vjepa2",
            _VJEPA,
            f"{_TRANSFORMERS}vjepa2.modeling_vjepa2.VJEPA2ForVideoClassification",
            pool="pooler",
            told=_VIDEOMAE.told,
        ),
    ),
    {
        "timm.models.vision_transformer.Block": Parts(),
        "timm.models.vision_transformer.Block with timm.layers.diff_attention.DiffAttention": Parts(attends_once=False),
        "timm.models.vision_transformer.ResPostBlock": _POST,
        "timm.models.eva.EvaBlock": _EVA,
        "timm.models.eva.EvaBlockPostNorm": replace(_POST, unturned="num_prefix_tokens"),
        "timm.models.beit.Block": replace(_EVA, head_dim=None, unturned=None),
        "timm.models.vision_transformer_relpos.RelPosBlock": Parts(bias="attn.rel_pos"),
        "timm.models.vision_transformer_relpos.ResPostRelPosBlock": replace(_POST, bias="attn.rel_pos"),
        "timm.models.deepseek_vit.DeepseekVitBlock": Parts(
            out_of_attention=("drop_path1",), out_of_mlp=("drop_path2",), unturned="num_prefix_tokens"
        ),
        "timm.models.gemma4_vit.Gemma4Block": Parts(
            out_of_attention=("norm2", "drop_path"), into_mlp=("norm3",), out_of_mlp=("norm4", "drop_path")
        ),
        "torchvision.models.vision_transformer.EncoderBlock": replace(
            _CLIP_BLOCK,
            attention="self_attention",
            heads="self_attention.num_heads",
            out_of_attention=("dropout",),
            out_of_mlp=(),
        ),
        "open_clip.transformer.ResidualAttentionBlock": _CLIP_BLOCK,
        "open_clip.transformer.CustomResidualAttentionBlock": replace(
            _CLIP_BLOCK, out_of_attention=("ln_attn", "ls_1"), head_dim="attn.head_dim"
        ),
        f"{_TRANSFORMERS}vit.modeling_vit.ViTLayer": _VIT_LAYER,
        f"{_TRANSFORMERS}deit.modeling_deit.DeiTLayer": _VIT_LAYER,
        f"{_TRANSFORMERS}ijepa.modeling_ijepa.IJepaLayer": _VIT_LAYER,
        f"{_TRANSFORMERS}beit.modeling_beit.BeitLayer": replace(
            _VIT_LAYER,
            out_of_attention=("dropout", "lambda_1", "drop_path"),
            out_of_mlp=("dropout", "lambda_2", "drop_path"),
            asked=True,
        ),
        f"{_TRANSFORMERS}dinov2.modeling_dinov2.Dinov2Layer": _DINO_LAYER,
        f"{_TRANSFORMERS}dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": _DINO_LAYER,
        f"{_TRANSFORMERS}dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": replace(
            _DINO_LAYER, heads="attention.num_heads"
        ),
        f"{_TRANSFORMERS}siglip.modeling_siglip.SiglipEncoderLayer": _SIGLIP_LAYER,
        f"{_TRANSFORMERS}clip.modeling_clip.CLIPEncoderLayer": _SIGLIP_LAYER,
        f"{_TRANSFORMERS}videomae.modeling_videomae.VideoMAELayer": replace(
            _VIT_LAYER,
            out_of_attention=(),
            mlp=("intermediate", "output.dense"),
            out_of_mlp=("output.dropout",),
            heads="attention.attention.num_attention_heads",
            head_dim="attention.attention.attention_head_size",
        ),
        f"{_TRANSFORMERS}aimv2.modeling_aimv2.Aimv2EncoderLayer": Parts(
            into_attention=("rms_norm1",),
            attention="attention",
            out_of_attention=(),
            into_mlp=("rms_norm2",),
            mlp=("ffn",),
            out_of_mlp=(),
            heads="attention.num_heads",
            head_dim="attention.head_dim",
        ),
        f"{_TRANSFORMERS}siglip2.modeling_siglip2.Siglip2EncoderLayer": _SIGLIP_LAYER,
        f"{_TRANSFORMERS}vjepa2.modeling_vjepa2.VJEPA2Layer": replace(
            _DINO_LAYER,
            out_of_attention=("drop_path",),
            out_of_mlp=("drop_path",),
            heads="attention.num_attention_heads",
            head_dim="attention.attention_head_size",
        ),
    },
)
"""What is known. Parts are of the blocks whose middle methods may act in; other blocks are called whole."""

POOLS = (
    "timm.layers.attention_pool.AttentionPoolLatent",
    f"{_TRANSFORMERS}siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead",
    f"{_TRANSFORMERS}siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead",
    f"{_TRANSFORMERS}vjepa2.modeling_vjepa2.VJEPA2AttentivePooler",
    f"{_TRANSFORMERS}aimv2.modeling_aimv2.Aimv2AttentionPoolingHead",
    "open_clip.transformer.AttentionalPooler",
)
"""What may pool all tokens by attention: by one call of it, or of several that attend to these tokens."""
