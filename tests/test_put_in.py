"""What somebody puts into a ViT's blocks, before or after a model is built around it, acts as it does in the ViT."""

import copy
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import DROP_NOTHING, METHODS, ONE_OF_EACH, images, small_vit, vary
from pairs import start_two
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune
from torch.utils.hooks import RemovableHandle

from adaptvit import Masked, Packed, Slab, save
from adaptvit.methods.adavit import AdaViT
from adaptvit.methods.dynamicvit import DynamicViT
from adaptvit.model import AdaptiveViT

MAPS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
PARTS = ("", "norm1", "attn", *MAPS, "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
"""Of a block: itself, and what of it people hook."""
WHEN = pytest.mark.parametrize("when", ["before", "after"])
"""Whether something is put into the ViT before the model is built, or after."""

Put = Callable[[nn.Module], object]
"""Puts something into a ViT."""


def nothing(vit: nn.Module) -> None:
    pass


def build(
    method: str, put: Put = nothing, when: str = "after", configs: dict = METHODS, **settings: Any
) -> AdaptiveViT:
    """A small model in float64 with something put into its ViT; of `DROP_NOTHING` in training, too, and surely."""
    vit = small_vit(dtype=torch.float64, depth=4 if configs is METHODS else 3, **settings)
    torch.manual_seed(1)
    if when == "before":
        put(vit)
    model = configs[method].build(vit)
    if when == "after":
        put(model.vit)
    if configs is METHODS:
        return vary(model.to(torch.float64))
    if isinstance(model, AdaViT):
        model.config = replace(model.config, lean=1000.0)  # so sure that gates pass no gradients
    if isinstance(model, DynamicViT):
        for predictor in model.score_predictor:
            predictor.out_conv[-1].bias.data[0] += 100
    return model.to(torch.float64)


@cache
def dropping_nothing(method: str) -> AdaptiveViT:
    """With nothing put in."""
    return build(method, configs=DROP_NOTHING)


@cache
def plain(method: str) -> AdaptiveViT:
    """With nothing put in."""
    return build(method)


same = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-8)


def assert_same_as_the_vit(model: AdaptiveViT) -> None:
    """In evaluation, by both layouts, and in training."""
    batch = images(model.vit, dtype=torch.float64)
    found = [model.eval()(batch, layout) for layout in (Masked, Packed)]
    wanted = model.vit(batch)
    for logits in found:
        same(logits, wanted)
    same(model.train()(batch, detailed=True).logits, model.vit(batch))


def gradients(module: nn.Module, logits: Tensor, *terms: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    (logits.square().sum() + sum(terms)).backward()
    return {name: part.grad.clone() for name, part in module.named_parameters() if part.grad is not None}


def trained(model: AdaptiveViT, count: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and all gradients of a step."""
    torch.manual_seed(0)
    output = model.train()(images(model.vit, count, dtype=torch.float64), detailed=True)
    return output.logits.detach(), gradients(model, output.logits, *output.terms.values())


# Maps


NOTHING = [name for name in DROP_NOTHING if name in ONE_OF_EACH]
"""Of these one setting each, too."""


class LowRank(nn.Module):
    """LoRA: a frozen map, and two small ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def low_rank(block: nn.Module, name: str) -> None:
    base = block.get_submodule(name)
    block.set_submodule(name, LowRank(base).to(base.weight.dtype))


def doubled(block: nn.Module, name: str) -> None:
    base = block.get_submodule(name)
    other = Doubled(base.in_features, base.out_features)
    other.load_state_dict(base.state_dict())
    block.set_submodule(name, other)


def weight_norm(block: nn.Module, name: str) -> None:
    layer = parametrizations.weight_norm(block.get_submodule(name))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)


def pruned(block: nn.Module, name: str) -> None:
    prune.l1_unstructured(block.get_submodule(name), "weight", 0.5)


def hooked(block: nn.Module, name: str) -> None:
    block.get_submodule(name).register_forward_hook(scaled)


def scaled(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return 1.5 * out


PUT_IN = {put.__name__: put for put in (low_rank, doubled, weight_norm, pruned, hooked)}


def in_all_maps(into: str) -> Put:
    def put(vit: nn.Module) -> None:
        for block in vit.blocks:
            for name in MAPS:
                PUT_IN[into](block, name)

    return put


@WHEN
@pytest.mark.parametrize("into", PUT_IN)
@pytest.mark.parametrize("method", NOTHING)
def test_where_nothing_is_dropped_it_acts_as_in_the_vit(method: str, into: str, when: str) -> None:
    model = build(method, in_all_maps(into), when, DROP_NOTHING)
    assert_same_as_the_vit(model)
    batch = images(model.vit, dtype=torch.float64)
    assert not torch.allclose(model.eval()(batch), dropping_nothing(method).eval()(batch), atol=1e-3)


@pytest.mark.parametrize("into", ["low_rank", "hooked"])
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_layouts_agree_on_it(method: str, into: str) -> None:
    assert_layouts_agree(build(method, in_all_maps(into)))


def assert_layouts_agree(model: AdaptiveViT, dtype: torch.dtype = torch.float64) -> None:
    batch = images(model.vit, dtype=dtype)
    masked, packed = (model.eval()(batch, layout, detailed=True) for layout in (Masked, Packed))
    close = same if dtype == torch.float64 else torch.testing.assert_close
    close(packed.logits, masked.logits)
    assert torch.equal(packed.usage.attended, masked.usage.attended)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_low_rank_maps_have_the_gradients_that_follow_from_the_whole_maps(method: str) -> None:
    model = build(method, in_all_maps("low_rank"))
    whole = copy.deepcopy(model)
    for block in whole.vit.blocks:
        for name in MAPS:
            put_in = block.get_submodule(name)
            with torch.no_grad():
                put_in.base.weight += put_in.up.weight @ put_in.down.weight
            block.set_submodule(name, put_in.base.requires_grad_(True))
    for one in (model, whole):
        trained(one)
    for number, block in enumerate(model.vit.blocks):
        for name in MAPS:
            put_in, wanted = block.get_submodule(name), whole.vit.blocks[number].get_submodule(name).weight.grad
            torch.testing.assert_close(put_in.up.weight.grad, wanted @ put_in.down.weight.T, atol=1e-8, rtol=1e-6)
            torch.testing.assert_close(put_in.down.weight.grad, put_in.up.weight.T @ wanted, atol=1e-8, rtol=1e-6)


@WHEN
@pytest.mark.parametrize("into", ["pruned", "weight_norm"])
@pytest.mark.parametrize("method", NOTHING)
def test_weights_made_of_others_follow_a_step(method: str, into: str, when: str) -> None:
    model = build(method, in_all_maps(into), when, DROP_NOTHING)
    batch = images(model.vit, dtype=torch.float64)
    before = model.eval()(batch).detach()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    trained(model)
    optimizer.step()
    after = model.eval()(batch)
    assert not torch.allclose(after, before, atol=1e-6)
    same(after, model.vit(batch))  # in this order: the ViT's own call brings the weights up to date
    if into == "pruned":
        for layer in (block.get_submodule(name) for block in model.vit.blocks for name in MAPS):
            off = layer.weight_mask == 0
            assert not layer.weight[off].any()
            assert not layer.weight_orig.grad[off].any()
            assert layer.weight_orig.grad[~off].any()


@pytest.mark.parametrize("into", ["low_rank", "doubled", "weight_norm", "pruned"])
def test_a_file_that_could_not_be_read_again_is_not_written(into: str, tmp_path: Path) -> None:
    model = METHODS["avit"].build(small_vit())
    in_all_maps(into)(model.vit)
    with pytest.raises(ValueError, match="has parts that its name and arguments do not give, so it cannot be saved"):
        save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


# PEFT's adapters


def lora() -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.LoraConfig(
        r=2, target_modules=r"(.*\.)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))", init_lora_weights=False
    )


def injected(vit: nn.Module) -> None:
    config = lora()
    sys.modules["peft"].inject_adapter_in_model(config, vit)


def wrapped_by_peft(vit: nn.Module) -> None:
    config = lora()
    sys.modules["peft"].get_peft_model(vit, config)  # puts the adapters into the ViT that it is given


@WHEN
@pytest.mark.parametrize("method", NOTHING)
def test_where_nothing_is_dropped_adapters_act_as_in_the_vit(method: str, when: str) -> None:
    model = build(method, injected, when, DROP_NOTHING)
    assert_same_as_the_vit(model)
    batch = images(model.vit, dtype=torch.float64)
    assert not torch.allclose(model.eval()(batch), dropping_nothing(method).eval()(batch), atol=1e-3)
    found = gradients(model, model.train()(batch, detailed=True).logits)
    wanted = gradients(model, model.vit(batch))
    assert sum("lora_" in name for name in wanted) == 2 * len(MAPS) * model.depth
    for name, gradient in wanted.items():
        same(found[name], gradient)


@WHEN
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_all_adapters_get_gradients(method: str, when: str) -> None:
    model = build(method, wrapped_by_peft, when)
    _, found = trained(model, count=16)
    usage = model(images(model.vit, 16, dtype=torch.float64), detailed=True).usage
    read = [block for block in range(model.depth) if usage.live[:, block, 0].any()]  # A-ViT's class tokens halt
    adapters = [name for name, _ in model.named_parameters() if "lora_" in name and int(name.split(".")[2]) in read]
    assert len(adapters) == 2 * len(MAPS) * len(read) > 2 * len(MAPS)
    assert [name for name in adapters if name not in found or not found[name].any()] == []
    assert_layouts_agree(model)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_peft_takes_a_built_model(method: str) -> None:
    config, model = lora(), build(method).eval()
    batch = images(model.vit, dtype=torch.float64)
    before = model(batch)
    adapted = sys.modules["peft"].get_peft_model(model, config).to(torch.float64).eval()
    assert not torch.allclose(adapted(batch), before, atol=1e-3)
    with adapted.disable_adapter():
        same(adapted(batch), before)


# Quantised maps


def quantised_by_torchao(how: str) -> Put:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return partial(torchao.quantize_, config=getattr(torchao, how)())


@WHEN
@pytest.mark.parametrize("how", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("method", NOTHING)
def test_maps_that_torchao_quantised_act_as_in_the_vit(method: str, how: str, when: str) -> None:
    vit, put = small_vit().eval().requires_grad_(False), quantised_by_torchao(how)
    batch = images(vit)
    before = vit(batch)
    if when == "before":
        put(vit)
    model = DROP_NOTHING[method].build(vit).eval()
    if when == "after":
        put(model.vit)
    wanted = vit(batch)
    rounding = (wanted - before).abs().max()
    assert 0 < rounding < 0.2 * before.std()
    with torch.no_grad():
        for layout in (Masked, Packed):
            off = (model(batch, layout) - wanted).abs().max()
            # tokens have steps of their own, but a value between two of them may fall to either
            assert off < (1e-5 if how == "Int8WeightOnlyConfig" else 0.5 * rounding)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_layouts_agree_on_maps_that_torchao_quantised(method: str) -> None:
    model = vary(METHODS[method].build(small_vit())).eval().requires_grad_(False)
    quantised_by_torchao("Int8WeightOnlyConfig")(model.vit)
    assert_layouts_agree(model, torch.float32)


@WHEN
@pytest.mark.filterwarnings("ignore:.*(quantiz|Storage)")  # of torch: what it deprecates
@pytest.mark.parametrize("method", NOTHING)
def test_dynamic_int8_maps_act_as_in_the_vit(method: str, when: str) -> None:
    def quantised(vit: nn.Module) -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(vit, {nn.Linear}, dtype=torch.qint8)

    vit = small_vit().eval()
    batch = images(vit)
    before = vit(batch)
    model = DROP_NOTHING[method].build(quantised(vit) if when == "before" else vit).eval()
    if when == "after":
        model.vit = quantised(model.vit)
    assert model.vit.blocks[0].attn.qkv.weight().dtype == torch.qint8
    wanted = model.vit(batch)
    rounding = (wanted - before).abs().max()  # by steps that follow the largest value of the tokens at hand
    for layout in (Packed, Masked):
        assert (model(batch, layout) - wanted).abs().max() < 1.5 * rounding
    assert 0 < rounding < 0.2 * before.std()


# Hooks


def counted(calls: Counter, vit: nn.Module) -> None:
    """Hooks on the parts of all blocks, which count calls by number of the block, part, and kind of hook."""
    for number, block in enumerate(vit.blocks):
        for name in PARTS:
            part = block.get_submodule(name)
            for kind, register in (("after", part.register_forward_hook), ("before", part.register_forward_pre_hook)):
                register(lambda *_, key=(number, name, kind): calls.update([key]))


def hooks_by_count(calls: Counter, model: AdaptiveViT, names: tuple[str, ...]) -> dict[tuple, int]:
    """Those not called exactly once."""
    keys = [(block, name, kind) for block in range(model.depth) for name in names for kind in ("after", "before")]
    return {key: calls[key] for key in keys if calls[key] != 1}


@WHEN
@pytest.mark.parametrize("method", NOTHING)
def test_a_hook_is_called_once_a_forward(method: str, when: str) -> None:
    calls = Counter[tuple]()
    model = build(method, partial(counted, calls), when, DROP_NOTHING, init_values=0.5, drop_path_rate=0.3)
    for train, layout, count in ((False, Masked, 3), (False, Packed, 3), (False, Packed, 64), (True, None, 3)):
        calls.clear()
        model.train(train)(images(model.vit, count, dtype=torch.float64), layout)
        assert hooks_by_count(calls, model, PARTS) == {}


@WHEN
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_hook_is_called_once_a_forward_that_drops_tokens(method: str, when: str) -> None:
    calls = Counter[tuple]()
    model = build(method, partial(counted, calls), when)
    for train, layout in ((False, Masked), (False, Packed), (False, Slab), (True, None)):
        calls.clear()
        usage = model.train(train)(images(model.vit, dtype=torch.float64), layout, detailed=True).usage
        entered = ((usage.attention | usage.mlp) & (usage.updated > 0)).any(dim=0).tolist()
        by_image = layout is Packed and method.startswith("adavit")  # images with other heads on run one by one
        wrong = hooks_by_count(calls, model, ("",) if by_image else PARTS)
        assert {key: count for key, count in wrong.items() if entered[key[0]] or count > 1} == {}


def edits(part: nn.Module, name: str, factor: float) -> Iterator[RemovableHandle]:
    """Hooks that change what the part gives, and what a larger one takes, one at a time."""
    yield part.register_forward_hook(lambda part, given, out: factor * out)
    if name in ("", "attn", "mlp"):
        yield part.register_forward_pre_hook(lambda part, given: (factor * given[0], *given[1:]))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("method", NOTHING)
def test_a_hooks_edit_acts_as_in_the_vit(method: str, name: str) -> None:
    model = dropping_nothing(method)
    batch = images(model.vit, dtype=torch.float64)
    without = model.eval()(batch)
    for factor, numbers in ((1.5, range(model.depth)), *([] if name else [(0.0, [1])])):
        parts = [model.vit.blocks[number].get_submodule(name) for number in numbers]
        for handles in zip(*(edits(part, name, factor) for part in parts), strict=True):
            with ExitStack() as stack:
                for handle in handles:
                    stack.enter_context(handle)
                assert_same_as_the_vit(model)
                assert not torch.allclose(model.eval()(batch), without, atol=1e-6)
    same(model.eval()(batch), without)


@pytest.mark.parametrize("method", NOTHING)
def test_a_hooks_edit_of_a_block_acts_in_a_model_built_after_it(method: str) -> None:
    def put(vit: nn.Module) -> None:
        vit.blocks[1].register_forward_hook(scaled)
        vit.blocks[2].register_forward_pre_hook(lambda block, given: (-given[0], *given[1:]))

    assert_same_as_the_vit(build(method, put, "before", DROP_NOTHING))


@WHEN
@pytest.mark.parametrize("method", NOTHING)
def test_a_blocks_backward_hooks_see_and_edit_gradients_as_in_the_vit(method: str, when: str) -> None:
    calls = Counter[tuple]()

    def put(vit: nn.Module) -> None:
        def doubled(number: int, block: nn.Module, given: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> tuple:
            calls.update([(number, "full")])
            return (2 * given[0], *given[1:])

        def noted(number: int, block: nn.Module, out: tuple[Tensor, ...]) -> None:
            assert out[0].any()
            calls.update([(number, "pre")])

        for number, block in enumerate(vit.blocks):
            block.register_full_backward_hook(partial(doubled, number))
            block.register_full_backward_pre_hook(partial(noted, number))

    model = build(method, put, when, DROP_NOTHING).train()
    batch = images(model.vit, dtype=torch.float64)
    found = gradients(model, model(batch, detailed=True).logits)
    once = {(number, kind): 1 for number in range(model.depth) for kind in ("full", "pre")}
    assert calls == once
    for name, gradient in gradients(model, model.vit(batch)).items():
        same(found[name], gradient)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_blocks_backward_hooks_are_called_once_a_step_that_drops_tokens(method: str) -> None:
    model, calls = build(method), Counter[int]()
    for number, block in enumerate(model.vit.blocks):
        block.register_full_backward_hook(lambda *_, number=number: calls.update([number]))
    trained(model)
    assert calls == dict.fromkeys(range(model.depth), 1)


# Checkpointed blocks


def switched(vit: nn.Module) -> None:
    vit.set_grad_checkpointing()


def wrapped(vit: nn.Module) -> None:
    for number, block in enumerate(vit.blocks):
        vit.blocks[number] = checkpoint_wrapper(block)


CHECKPOINTED = {put.__name__: put for put in (switched, wrapped)}
DECIDE = {
    "avit": "halting_score",
    "ats": "choose",
    "adavit": "gate",
    "evit": "best",
    "dynamicvit": "kept_of",
    "tome": "places",
    "calibrated": "places",
    "merge": "places",
    "grid": "joined",
}
"""What a method's model decides by in training, between blocks or within."""


def of_the_block(name: str) -> str:
    """A parameter's name without that of what is around its block."""
    return name.replace("._checkpoint_wrapped_module", "")


@pytest.mark.parametrize(("put", "when"), [("switched", "before"), ("switched", "after"), ("wrapped", "after")])
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_checkpointed_blocks_give_the_same(method: str, put: str, when: str) -> None:
    model, without = build(method, CHECKPOINTED[put], when), plain(method).eval()
    batch = images(model.vit, dtype=torch.float64)
    for layout in (Masked, Packed):
        same(model.eval()(batch, layout), without(batch, layout))
    assert_trained_as_plain(model, method)


@cache
def plainly_trained(method: str) -> tuple[Tensor, dict[str, Tensor]]:
    return trained(plain(method))


def assert_trained_as_plain(model: AdaptiveViT, method: str) -> None:
    (logits, found), (wanted_logits, wanted) = trained(model), plainly_trained(method)
    same(logits, wanted_logits)
    assert {of_the_block(name) for name in found} == set(wanted)
    for name, gradient in found.items():
        same(gradient, wanted[of_the_block(name)])


def kept_for_backward(model: AdaptiveViT) -> int:
    """Bytes of the features that a training forward keeps."""
    weights = {part.untyped_storage().data_ptr() for part in model.state_dict().values()}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other is put where it was
        return t

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model.train()(images(model.vit, dtype=torch.float64), detailed=True)
    assert output.logits.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("put", CHECKPOINTED)
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_checkpointed_blocks_keep_less(method: str, put: str) -> None:
    assert kept_for_backward(build(method, CHECKPOINTED[put])) < 0.5 * kept_for_backward(plain(method))


@pytest.mark.parametrize("put", CHECKPOINTED)
@pytest.mark.parametrize("method", ONE_OF_EACH[1:])
def test_checkpointed_blocks_do_not_decide_again(method: str, put: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(method, CHECKPOINTED[put])
    name, calls = DECIDE[method.removeprefix("unfused ").partition(",")[0]], Counter[str]()
    decide = getattr(model, name)

    def counting(*args: Any, **options: Any) -> Any:
        calls.update(["decided"])
        return decide(*args, **options)

    monkeypatch.setattr(model, name, counting)
    hook = model.vit.blocks[1].register_forward_hook(lambda *_: calls.update(["block 1"]))
    output = model.train()(images(model.vit, dtype=torch.float64), detailed=True)
    before = calls["decided"]
    assert before > 0
    assert calls["block 1"] == 1
    gradients(model, output.logits, *output.terms.values())
    assert calls["decided"] == before
    hook.remove()


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_model_switches_its_vits_checkpoints(method: str) -> None:
    model, most = build(method), kept_for_backward(plain(method))
    model.set_grad_checkpointing()
    assert model.vit.grad_checkpointing
    assert_trained_as_plain(model, method)
    assert kept_for_backward(model) < 0.5 * most
    model.set_grad_checkpointing(False)
    assert not model.vit.grad_checkpointing
    assert kept_for_backward(model) == most


# One module in two places


def share_block(vit: nn.Module) -> None:
    vit.blocks[1] = vit.blocks[0]


def share_attention(vit: nn.Module) -> None:
    vit.blocks[1].attn = vit.blocks[0].attn


SHARED = {put.__name__: put for put in (share_block, share_attention)}


@WHEN
@pytest.mark.parametrize("put", SHARED)
@pytest.mark.parametrize("method", NOTHING)
def test_a_module_of_two_blocks_acts_as_in_the_vit(method: str, put: str, when: str) -> None:
    model = build(method, SHARED[put], when, DROP_NOTHING)
    assert_same_as_the_vit(model)
    batch = images(model.vit, dtype=torch.float64)
    found = gradients(model, model.train()(batch, detailed=True).logits)
    for name, gradient in gradients(model, model.vit(batch)).items():
        same(found[name], gradient)


@pytest.mark.parametrize("put", SHARED)
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_layouts_agree_on_a_module_of_two_blocks(method: str, put: str) -> None:
    assert_layouts_agree(build(method, SHARED[put]))


@pytest.mark.parametrize("method", NOTHING)
def test_a_hook_on_a_module_of_two_blocks_is_called_for_both(method: str) -> None:
    model, calls = build(method, share_block, "before", DROP_NOTHING), Counter[str]()
    for name in ("", "attn", "attn.qkv", "mlp"):
        part = model.vit.blocks[0].get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    for train, layout in ((False, Masked), (False, Packed), (True, None)):
        calls.clear()
        model.train(train)(images(model.vit, dtype=torch.float64), layout)
        assert calls == dict.fromkeys(("", "attn", "attn.qkv", "mlp"), 2)


# Blocks sharded over processes

SHARDED = ("full", "avit", "tome", "ats", "dynamicvit", "adavit", "adavit, patches")


def loss_of(model: AdaptiveViT, half: int, detailed: bool) -> Tensor:
    """Of one half of a batch; the gradient has that of the method's loss terms either way."""
    torch.manual_seed(half)
    rows = slice(2 * half, 2 * half + 2)
    batch, labels = images(small_vit(), 4, dtype=torch.float64)[rows], torch.arange(4)[rows]
    if not detailed:
        return cross_entropy(model(batch), labels)
    output = model(batch, detailed=True)
    return cross_entropy(output.logits, labels) + sum(output.terms.values())


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def step_of(model: AdaptiveViT) -> dict[str, Tensor]:
    """The gradients at hand and the weights after a step by them."""
    parts = {of_the_block(name): part for name, part in model.named_parameters()}
    found = {f"gradient of {name}": whole(part.grad) for name, part in parts.items() if part.grad is not None}
    torch.optim.SGD(model.parameters(), 0.1).step()
    return found | {name: whole(part.detach()).clone() for name, part in parts.items()}


def steps_on_one_of_two(rank: int, folder: str) -> None:
    """By case: the loss and the step, or what went wrong."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), world_size=2, rank=rank)
    mesh, found = init_device_mesh("cpu", (2,)), {}

    def by_block(vit: nn.Module) -> None:
        for block in vit.blocks:
            fully_shard(block, mesh=mesh)

    for method in SHARDED:
        for when, detailed in (("before", False), ("after", True)):
            try:
                torch.manual_seed(0)
                vit = small_vit(dtype=torch.float64).train()
                if when == "before":
                    by_block(vit)
                model = METHODS[method].build(vit)
                if when == "after":
                    by_block(model.vit)
                fully_shard(model, mesh=mesh)
                loss = loss_of(model, rank, detailed)
                loss.backward()
                loss = loss.detach()
                dist.all_reduce(loss)
                found[method, when, detailed] = {"loss": loss / 2} | step_of(model)
            except Exception as error:
                found[method, when, detailed] = f"{type(error).__name__}: {error}"
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    start_two(steps_on_one_of_two, folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(("when", "detailed"), [("before", False), ("after", True)])
@pytest.mark.parametrize("method", SHARDED)
def test_blocks_sharded_over_two_processes_step_as_one_process(
    method: str, when: str, detailed: bool, sharded: dict[tuple, Any]
) -> None:
    torch.manual_seed(0)
    model = METHODS[method].build(small_vit(dtype=torch.float64).train())
    model.terms_scale = 0.5  # of the terms that logits carry, as of the loss
    loss = sum(loss_of(model, half, detailed) for half in range(2)) / 2
    loss.backward()
    wanted, found = {"loss": loss.detach()} | step_of(model), sharded[method, when, detailed]
    assert isinstance(found, dict), found
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-9)


# Copies, averages, threads


def adapted_and_hooked(vit: nn.Module) -> None:
    in_all_maps("low_rank")(vit)
    for block in vit.blocks:
        block.register_forward_hook(scaled)
        block.attn.register_forward_hook(scaled)


def pickled(model: AdaptiveViT) -> AdaptiveViT:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("put", [nothing, adapted_and_hooked])
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_copy_does_the_same_by_itself(method: str, again: Callable, put: Put) -> None:
    model = build(method, put).eval()
    batch = images(model.vit, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(batch)
        other = again(model)
        assert torch.equal(other(batch), wanted)
        for part in other.vit.blocks[0].parameters():
            part.mul_(-1)
        assert not torch.allclose(other(batch), wanted)
        assert torch.equal(model(batch), wanted)


@pytest.mark.parametrize("put", [pytest.param(nothing, marks=pytest.mark.long), adapted_and_hooked])
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_moving_average_is_a_model_of_the_mean_weights(method: str, put: Put) -> None:
    model = build(method, put)
    average, mean = ModelEmaV3(model, decay=0.75), copy.deepcopy(model).eval()
    trained(model)
    torch.optim.SGD([part for part in model.parameters() if part.requires_grad], 0.01).step()
    average.update(model)
    with torch.no_grad():
        for part, new in zip(mean.parameters(), model.parameters(), strict=True):
            part.lerp_(new, 0.25)
        batch = images(model.vit, dtype=torch.float64)
        same(average.module.eval()(batch), mean(batch))


@pytest.mark.parametrize("put", [pytest.param(nothing, marks=pytest.mark.long), adapted_and_hooked])
@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_four_threads_run_one_model_and_its_vit(method: str, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(method, put).eval()
    batches = [images(model.vit, count, seed=count, dtype=torch.float64) for count in (1, 2, 3, 4)]
    start, found = threading.Barrier(4), {}

    def run(place: int) -> None:
        start.wait()
        with torch.no_grad():
            found[place] = [
                (model(batches[place], (Packed, Masked)[place % 2]), model.vit(batches[place])) for _ in range(2)
            ]

    with torch.no_grad():
        wanted = [(model(batch, (Packed, Masked)[place % 2]), model.vit(batch)) for place, batch in enumerate(batches)]
    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for place, (logits, plain) in enumerate(wanted):
        for again, plain_again in found[place]:
            same(again, logits)
            same(plain_again, plain)
