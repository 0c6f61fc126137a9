"""A family for a model that nobody has described: guessed from one forward, and proved by others.

The guess is the longest list of like blocks, the convolution that cuts patches, how many tokens come before those, and
what is read of the last block. It holds where the model gives the same with tokens in the place of its blocks, where
each block gives the same of tokens in another order, and where tokens that are gone have no part in what is pooled.

Letters: B images, N token slots, P patches, D channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from adaptvit.backbones.base import model_name
from adaptvit.backbones.blocks import run_block
from adaptvit.backbones.door import Acts
from adaptvit.backbones.families import FAMILIES, Family, Table, find, get
from adaptvit.backbones.forward import Source, run, scores
from adaptvit.tokens import Packed, Tokens

SIZES = ("img_size", "image_size", "config.image_size", "patch_embed.img_size")
"""Where models say the size of their images."""
CLASSES = ("num_classes", "num_labels", "config.num_labels")
"""Where they say how many classes they have."""
TABLES: dict[str, Table] = {"rope": "sin cos", "position_embeddings": "cos, sin"}
"""Arguments by which blocks are told positions."""
APART = 1e-4
"""How far results may lie apart, of the largest of them, in float32."""


def guess(vit: nn.Module) -> Family:
    """The family of a model, which `FAMILIES` keeps for it.

    Raises:
        TypeError: naming what was not found, or does not hold.
    """
    said = f"{model_name(vit)} is a {type(vit).__name__}, of no family that is known, and"
    training, family = vit.training, _outline(vit, said)
    vit.eval()
    try:
        FAMILIES.keep(vit, family)
        FAMILIES.keep(vit, family := _seen(vit, family, said))
        _prove(vit, family, said)
    except BaseException as error:
        FAMILIES.drop(vit)
        if isinstance(error, Exception):  # whatever a model raises that is called in a way that it is not made for
            raise error if str(error).startswith(said) else TypeError(f"{said} {error}") from error
        raise
    finally:
        vit.train(training)
    return family


def _outline(vit: nn.Module, said: str) -> Family:
    """What the modules tell."""
    lists = [
        (len(part), name)
        for name, part in vit.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential) and len({type(block) for block in part}) == 1 < len(part)
    ]
    if not lists:
        raise TypeError(f"{said} has no list of two or more blocks that are alike")
    cuts = [
        name
        for name, part in vit.named_modules()
        if isinstance(part, nn.Conv2d) and tuple(part.kernel_size) == tuple(part.stride)
    ]
    if not cuts:
        raise TypeError(f"{said} has no convolution that cuts images into patches")
    sizes = [name for name in SIZES if find(vit, name) is not None]
    if not sizes:
        raise TypeError(f"{said} does not say the size of its images, as {', '.join(SIZES)}")
    linear = [name for name, part in vit.named_modules() if isinstance(part, nn.Linear)]
    blocks = max(lists, key=lambda found: found[0])[1]
    head = linear[-1] if linear and not linear[-1].startswith(f"{blocks}.") else None
    classes = [name for name in CLASSES if find(vit, name) is not None]
    return Family(
        models=(),
        blocks=blocks,
        norm=None,
        pool=None,
        tables={},
        prefix=(0,),
        pools_prefix=False,
        reads=None,
        stem=cuts[0],
        channels=f"{cuts[0]}.in_channels",
        size=sizes[0],
        any_size=False,
        patch=f"{cuts[0]}.kernel_size",
        width=f"{cuts[0]}.out_channels",
        classes=classes[0] if classes else f"{head}.out_features" if head else 0,
        heads=(head,) if head else (),
    )


def _images(vit: nn.Module, family: Family) -> Tensor:
    size = get(vit, str(family.size))
    height, width = (size, size) if isinstance(size, int) else size
    weight = get(vit, f"{family.stem}.weight")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, get(vit, family.channels), height, width, generator=generator)
    return images.to(weight)


def _seen(vit: nn.Module, family: Family, said: str) -> Family:
    """What a forward tells."""
    images, seen = _images(vit, family), dict[str, Any]()
    names = {id(part): name for name, part in vit.named_modules()}

    def inside(x: Tensor, source: Source) -> tuple[Tensor, None]:
        seen.update(slots=x.shape[1], patches=source.patches, told=source.told(0))
        for block, (args, kwargs) in zip(get(vit, family.blocks), source.calls, strict=True):
            x = block(x, *args, **kwargs)
        seen["x"] = x.detach().requires_grad_()
        return seen["x"], None

    def watch(part: nn.Module, given: tuple[Any, ...]) -> None:
        if "x" in seen and "after" not in seen and given and given[0] is seen["x"]:
            seen["after"] = names.get(id(part))

    hook = register_module_forward_pre_hook(watch)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(scores(run(vit, images, inside))[0].float().square().sum(), seen["x"])
    finally:
        hook.remove()
    prefix = seen["slots"] - seen["patches"]
    if prefix < 0:
        raise TypeError(f"{said} has {seen['slots']} tokens of {seen['patches']} patches")
    tables = {name: TABLES[name] for name, value in seen["told"].items() if name in TABLES and value is not None}
    if odd := sorted(
        name for name, value in seen["told"].items() if isinstance(value, Tensor) and value.ndim and name not in tables
    ):
        raise TypeError(f"{said} tells its blocks {odd[0]}, of which nothing is known")
    read = int(gradient.abs().sum(dim=(0, 2)).nonzero().max()) + 1
    return _with(
        family,
        norm=seen.get("after"),
        tables=tables,
        prefix=(prefix,),
        reads=read if read <= prefix else None,
    )


def _with(family: Family, **fields: Any) -> Family:
    return Family(**{**vars(family), **fields})


@torch.no_grad()
def _prove(vit: nn.Module, family: Family, said: str) -> None:
    images = _images(vit, family)
    generator = torch.Generator().manual_seed(1)
    theirs = scores(vit(images))[0]
    if family.reads is None and theirs.ndim > 2:
        raise TypeError(
            f"{said} gives all its tokens and nothing that is pooled of them, by which a guess could be proved: put it "
            "into a module that pools them, or describe it by a row, adaptvit.FAMILIES"
        )
    blocks = len(get(vit, family.blocks))

    def all_of_it(x: Tensor, source: Source) -> tuple[Tensor, None]:
        tokens: Tokens = Packed.of(x).of_source(source)
        for number in range(blocks):
            tokens = run_block(number, tokens, Acts())
        return tokens.grid(tokens.x), None

    _same(
        scores(run(vit, images, all_of_it))[0], theirs, f"{said} gives something else when its blocks are called here"
    )

    def in_another_order(x: Tensor, source: Source) -> tuple[Tensor, None]:
        order = torch.randperm(x.shape[1], generator=generator).to(x.device)
        laid, where = Packed.of(x), order.repeat(len(x))
        tokens: Tokens = laid.of_source(source)
        moved: Tokens = Packed(x[:, order].flatten(0, 1), laid.shape, laid.slots, where=where, source=source)
        for number, block in enumerate(get(vit, family.blocks)):
            tokens, moved = (run_block(number, some, Acts()) for some in (tokens, moved))
            there = tokens.grid(tokens.x)[:, order]
            _same(
                moved.grid(moved.x), there, f"{said} has blocks, {type(block).__name__}, that go by the order of tokens"
            )
        return tokens.grid(tokens.x), None

    run(vit, images, in_another_order)
    if family.reads is not None:
        return

    def half(hidden: bool) -> Callable[[Tensor, Source], tuple[Tensor, Tensor | None]]:
        def inside(x: Tensor, source: Source) -> tuple[Tensor, Tensor | None]:
            count = x.shape[1] - source.patches // 2
            if not hidden:
                return x[:, :count], None
            live = torch.arange(x.shape[1], device=x.device) < count
            return x * live[:, None], live.expand(len(x), -1)

        return inside

    few, filled = (scores(run(vit, images, half(hidden)))[0] for hidden in (False, True))
    _same(filled, few, f"{said} pools all its tokens in a way that tokens that are gone have a part in")


def _same(ours: Tensor, theirs: Tensor, otherwise: str) -> None:
    apart = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-30)
    if not math.isfinite(apart) or apart > APART:
        raise TypeError(f"{otherwise}: {apart:.2g} of the largest value apart; describe it by a row, adaptvit.FAMILIES")
