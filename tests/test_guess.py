"""A ViT that nobody has described is guessed, and the guess proved; what does not hold is refused by name."""

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import adaptvit
from adaptvit import ATSConfig, AViTConfig, DynamicViTConfig, EViTConfig, FullConfig, Masked, MergeConfig, Packed

CONFIGS = {
    "full": FullConfig(),
    "avit": AViTConfig(gate_scale=4.0, gate_center=2.0),
    "ats": ATSConfig(rate=0.5),
    "evit": EViTConfig(),
    "merge": MergeConfig(thresholds=0.3),
    "dynamicvit": DynamicViTConfig(),
}


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.maps, self.out = kind, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.maps(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        if self.kind == "places in the block":
            q = q + torch.arange(q.shape[2])[:, None] / 10
        if self.kind == "no attention":
            mixed = (q @ k.mT / 4).softmax(dim=-1) @ v
        else:
            mixed = scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before, self.attending, self.after = nn.LayerNorm(32), Attention(kind), nn.LayerNorm(32)
        self.hidden = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.attending(self.before(x))
        return x + self.hidden(self.after(x))


class Own(nn.Module):
    """A ViT as people write them."""

    def __init__(self, kind: str = "class token") -> None:
        super().__init__()
        self.kind, self.image_size = kind, 32
        self.cut = nn.Conv2d(3, 32, 8, 8)
        self.start = nn.Parameter(torch.randn(1, 1, 32))
        self.places = nn.Parameter(torch.randn(1, 17, 32))
        self.layers = nn.ModuleList(Layer(kind) for _ in range(4))
        self.last, self.classifier = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.cut(images).flatten(2).mT
        x = torch.cat([self.start.expand(len(x), -1, -1), x], dim=1) + self.places
        for layer in self.layers:
            x = layer(x, x.new_ones(17)) if self.kind == "something told" else layer(x)
        x = self.last(x)
        if self.kind == "mean":
            return self.classifier(x[:, 1:].mean(dim=1))
        if self.kind == "tokens":
            return x
        if self.kind == "sum":
            return self.classifier(x.sum(dim=1))
        return self.classifier(x[:, 0])


def own(kind: str = "class token") -> Own:
    torch.manual_seed(0)
    return Own(kind).double().eval()


@pytest.fixture
def images() -> Tensor:
    contrasts = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)[:, None, None, None]
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * contrasts


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["class token", "mean"])
def test_methods_run_on_a_guess(kind: str, config: adaptvit.MethodConfig, images: Tensor) -> None:
    vit = own(kind)
    model = config.build(vit).eval()
    with torch.no_grad():
        packed, masked = model(images, Packed, detailed=True), model(images, Masked, detailed=True)
        one = model(images[:1], detailed=True)
        with FlopCounterMode(display=False) as counter:
            model(images[:1])
    torch.testing.assert_close(packed.logits, masked.logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(packed.logits[:1], one.logits, rtol=1e-10, atol=1e-12)
    assert packed.usage == masked.usage
    assert counter.get_total_flops() // 2 == one.usage.macs.item()
    if config.method == "full":
        torch.testing.assert_close(packed.logits, vit(images), rtol=1e-12, atol=1e-14)
    else:
        assert (packed.usage.share < 1).any()


def test_a_guess_goes_with_copies(images: Tensor) -> None:
    model = MergeConfig(thresholds=0.3).build(own()).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), model(images))


def test_a_guess_can_be_adapted(images: Tensor) -> None:
    model = adaptvit.adapt(own(), images, 0.8, tolerance=0.1)
    assert model(images, detailed=True).usage.share.mean() == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("places in the block", "has blocks, Layer, that go by the order of tokens"),
        ("no attention", "does not attend by scaled_dot_product_attention"),
        ("something told", "tells its blocks bias, of which nothing is known"),
        ("tokens", "gives all its tokens and nothing that is pooled of them"),
        ("sum", "pools all its tokens in a way that tokens that are gone have a part in"),
    ],
)
def test_what_does_not_hold_is_refused(kind: str, said: str) -> None:
    vit = own(kind).train()
    with pytest.raises(TypeError, match=f"Own is a Own, of no family that is known, and .*{said}"):
        FullConfig().build(vit)
    assert vit.training


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(TypeError, match="resnet18 is a ResNet, of no family that is known"):
        FullConfig().build(timm.create_model("resnet18"))


def test_blocks_that_take_no_tokens_are_refused() -> None:
    vit = timm.create_model("crossvit_tiny_240", device="meta")
    with pytest.raises(TypeError, match=r"crossvit_tiny_240 is a CrossVit, of no family that is known, and has"):
        FullConfig().build(vit)
    with pytest.raises(TypeError, match=r"blocks that take something else than tokens \(batch, tokens, channels\)"):
        FullConfig().build(timm.create_model("crossvit_9_240", device="meta"))
