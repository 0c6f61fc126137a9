"""Recordings laid out as in `tests/parity`, of sizes that none of those has.

Each method is written out here once more, in float64 and one image at a time, without anything of adaptvit. The ViT is
timm's up to 0.5: a conv over patches, a class token, blocks, a norm, perhaps a linear map with tanh, the head.

Letters: N tokens of an image (class token first), H heads, d channels per head, D channels, C classes.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import weights
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, gelu, layer_norm, linear, normalize, unfold

Shapes = dict[str, list[int]]


def write(folder: Path, name: str, case: dict[str, Any], arrays: Mapping[str, Any]) -> None:
    """A json and its arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(case))
    found = {key: np.asarray(value.detach() if isinstance(value, Tensor) else value) for key, value in arrays.items()}
    as_stored = {key: value.astype(np.float32) if value.dtype == np.float64 else value for key, value in found.items()}
    np.savez(folder / f"{name}.npz", **as_stored)


@dataclass
class Sizes:
    """Of a ViT; heads x head_dim need not be dim."""

    image: int = 16
    patch: int = 4
    channels: int = 2
    dim: int = 24
    heads: int = 3
    head_dim: int = 12
    hidden: int = 40
    depth: int = 4
    classes: int = 7
    representation: int | None = 10
    bias: bool = True

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    def manifest(self) -> Shapes:
        dim, width, last = self.dim, self.heads * self.head_dim, self.representation or self.dim
        shapes = {
            "cls_token": [1, 1, dim],
            "pos_embed": [1, self.patches + 1, dim],
            "patch_embed.proj.weight": [dim, self.channels, self.patch, self.patch],
            "patch_embed.proj.bias": [dim],
        }
        for block in range(self.depth):
            maps = {"attn.qkv": (3 * width, dim), "attn.proj": (dim, width)}
            maps |= {"mlp.fc1": (self.hidden, dim), "mlp.fc2": (dim, self.hidden)}
            for norm in ("norm1", "norm2"):
                shapes |= {f"blocks.{block}.{norm}.{part}": [dim] for part in ("weight", "bias")}
            for name, shape in maps.items():
                shapes[f"blocks.{block}.{name}.weight"] = [*shape]
                if self.bias or name != "attn.qkv":
                    shapes[f"blocks.{block}.{name}.bias"] = [shape[0]]
        shapes |= {"norm.weight": [dim], "norm.bias": [dim]}
        if self.representation:
            shapes |= {"pre_logits.fc.weight": [last, dim], "pre_logits.fc.bias": [last]}
        return shapes | {"head.weight": [self.classes, last], "head.bias": [self.classes]}


@dataclass
class ViT:
    """By its weights, an image at a time."""

    state: dict[str, Tensor]
    heads: int
    eps: float = 1e-6
    scale: float | None = None
    """What attention's logits are taken times; None is 1 / sqrt(d)."""

    def norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], self.eps)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def embed(self, image: Tensor) -> Tensor:
        """(channels, rows, columns) -> (N, D)."""
        kernel, bias = self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"]
        patches = conv2d(image[None], kernel, bias, stride=kernel.shape[2:])[0].flatten(1).T
        return torch.cat([self.state["cls_token"][0], patches]) + self.state["pos_embed"][0]

    def project(self, block: int, x: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (H, N, d) each; of tokens (N,) times `live` before their norm and after it."""
        m = 1.0 if live is None else live[:, None]
        qkv = self.linear(f"blocks.{block}.attn.qkv", self.norm(f"blocks.{block}.norm1", x * m) * m)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        return q, k, v

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """(H, N, N)."""
        return q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def merge(self, block: int, mixed: Tensor) -> Tensor:
        """(H, N, d) -> (N, D)."""
        return self.linear(f"blocks.{block}.attn.proj", mixed.transpose(0, 1).flatten(1))

    def mlp(self, block: int, x: Tensor, live: Tensor | None = None) -> Tensor:
        m = 1.0 if live is None else live[:, None]
        hidden = gelu(self.linear(f"blocks.{block}.mlp.fc1", self.norm(f"blocks.{block}.norm2", x * m) * m))
        return self.linear(f"blocks.{block}.mlp.fc2", hidden)

    def classify(self, x: Tensor) -> Tensor:
        """(D,) -> (C,)."""
        x = self.norm("norm", x)
        if "pre_logits.fc.weight" in self.state:
            x = self.linear("pre_logits.fc", x).tanh()
        return self.linear("head", x)


def wide(manifest: Shapes, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value).double() for key, value in weights.fill(manifest, seed, scale).items()}


def images_of(sizes: Sizes, batch: int, seed: int) -> Tensor:
    return torch.from_numpy(weights.images(batch, sizes.image, seed, sizes.channels)).double()


# ---- EViT


def evit(folder: Path) -> None:
    """Rates at run time, of which two are 1; numbers of tokens for one block, the others by their rates."""
    _evit(folder, "rates", [1, 1, 0.4, 0.75], None)
    _evit(folder, "numbers", None, [None, None, 6, None])


def _evit(folder: Path, name: str, told: Sequence[float] | None, numbers: Sequence[int | None] | None) -> None:
    """Configured rates are 1, 0.7, 0.5 and 0.6."""
    sizes, configured, seed = Sizes(), [1, 0.7, 0.5, 0.6], 1
    state = wide(sizes.manifest(), seed)
    vit, arrays, left = ViT(state, sizes.heads), {}, []
    found: dict[str, list[Any]] = {}
    for image in images_of(sizes, 2, seed):
        x, ids, left = vit.embed(image), list(range(sizes.patches)), []
        for block, rate in enumerate(configured):
            q, k, v = vit.project(block, x)
            attention = vit.logits(q, k).softmax(dim=-1)
            x = x + vit.merge(block, attention @ v)
            now = rate if told is None else told[block]
            keep = math.ceil((now if rate < 1 else 1) * len(ids))
            keep = (numbers[block] if numbers else None) or keep
            if keep < len(ids):
                score = attention[:, 0, 1:].mean(dim=0)
                order = score.argsort(descending=True).tolist()
                kept, dropped = order[:keep], order[keep:]
                fused = sum(score[place] * x[1 + place] for place in dropped)
                x = torch.cat([x[:1], x[1:][kept], fused[None]])
                ids = [ids[place] for place in kept]
                found.setdefault(f"kept_patch_{block}", []).append(ids)
                found.setdefault(f"cls_attn_{block}", []).append(score)
                ids = [*ids, -1]
            left.append(len(ids))
            x = x + vit.mlp(block, x)
        found.setdefault("logits", []).append(vit.classify(x[0]))
    for key, rows in found.items():
        arrays[key] = np.array(rows) if key.startswith("kept") else torch.stack(rows)
    case = {
        "model": {"img_size": sizes.image, "patch_size": sizes.patch, "num_heads": sizes.heads, "norm_eps": 1e-6},
        "settings": {
            "keep_rate": configured,
            "fuse_token": True,
            "runtime_keep_rate": told,
            "runtime_tokens": numbers,
        },
        "tokens_after_block_excl_cls": left,
        "weights": {"seed": seed, "scale": 1.0, "manifest": sizes.manifest()},
        "input": {"batch": 2, "size": sizes.image, "seed": seed},
        "checks": {"f32_f64_maxabs": 0.0},
    }
    write(folder / "evit", name, case, arrays)


# ---- DynamicViT


def dynamicvit(folder: Path, seed: int = 5) -> None:
    """Keep ratios 0.8, 0.75 and 0.3 of three stages, before blocks 0, 2 and 3."""
    sizes = Sizes(image=12, patch=3, channels=5, dim=16, heads=2, head_dim=4, representation=None)
    stages, ratios = [0, 2, 3], [0.8, 0.75, 0.3]
    manifest, dim = sizes.manifest(), sizes.dim
    for stage in range(len(stages)):
        parts = {"in_conv.0": [dim], "in_conv.1": [dim, dim], "out_conv.0": [dim // 2, dim]}
        parts |= {"out_conv.2": [dim // 4, dim // 2], "out_conv.4": [2, dim // 4]}
        for part, shape in parts.items():
            manifest |= {f"score_predictor.{stage}.{part}.weight": shape}
            manifest |= {f"score_predictor.{stage}.{part}.bias": shape[:1]}
    vit = ViT(wide(manifest, seed), sizes.heads)
    found: dict[str, list[Any]] = {}
    for image in images_of(sizes, 2, seed):
        x, ids = vit.embed(image), list(range(sizes.patches))
        for block in range(sizes.depth):
            if block in stages:
                stage = stages.index(block)
                predictor = ViT({k.removeprefix(f"score_predictor.{stage}."): v for k, v in vit.state.items()}, 1, 1e-5)
                local, shared = gelu(predictor.linear("in_conv.1", predictor.norm("in_conv.0", x[1:]))).chunk(2, dim=1)
                u = torch.cat([local, shared.mean(dim=0).expand_as(shared)], dim=1)
                for part in ("out_conv.0", "out_conv.2"):
                    u = gelu(predictor.linear(part, u))
                score = predictor.linear("out_conv.4", u).log_softmax(dim=1)[:, 0]
                kept = score.argsort(descending=True)[: int(sizes.patches * ratios[stage])].tolist()
                x, ids = torch.cat([x[:1], x[1:][kept]]), [ids[place] for place in kept]
                found.setdefault(f"score_{stage}", []).append(score)
                found.setdefault(f"kept_patch_{stage}", []).append(ids)
            q, k, v = vit.project(block, x)
            x = x + vit.merge(block, vit.logits(q, k).softmax(dim=-1) @ v)
            x = x + vit.mlp(block, x)
        found.setdefault("logits", []).append(vit.classify(x[0]))
    arrays = {key: np.array(rows) if key[:4] == "kept" else torch.stack(rows) for key, rows in found.items()}
    case = {
        "mode": "eval",
        "model": {"img_size": sizes.image, "num_heads": sizes.heads, "norm_eps": 1e-6, "predictor_norm_eps": 1e-5},
        "settings": {
            "pruning_loc": stages,
            "token_ratio": ratios,
            "kept_counts": [int(sizes.patches * ratio) for ratio in ratios],
        },
        "weights": {"seed": seed, "scale": 1.0, "manifest": manifest},
        "input": {"batch": 2, "size": sizes.image, "seed": seed},
        "checks": {"f32_f64_maxabs": 0.0},
    }
    write(folder / "dynamicvit", "several_ratios", case, arrays)


# ---- ToMe


def tome(folder: Path, seed: int = 3) -> None:
    """One channel, a representation layer, and r of 3, 0, 5 and 2."""
    sizes, several = Sizes(channels=1, heads=2, head_dim=10), [3, 0, 5, 2]
    vit = ViT(wide(sizes.manifest(), seed), sizes.heads)
    found: dict[str, list[Any]] = {}
    effective: list[int] = []
    for image in images_of(sizes, 2, seed):
        x, effective = vit.embed(image), []
        size, group, number = torch.ones(len(x)).double(), torch.arange(len(x)), count()
        for block, wanted in enumerate(several):
            q, k, v = vit.project(block, x)
            x = x + vit.merge(block, (vit.logits(q, k) + size.log()).softmax(dim=-1) @ v)
            r = min(wanted, (len(x) - 1) // 2)
            if r:
                metric = normalize(k.mean(dim=0), dim=-1)
                first, second = list(range(0, len(x), 2)), list(range(1, len(x), 2))
                similar = metric[first] @ metric[second].T
                similar[0] = -math.inf
                best, target = similar.max(dim=1)
                sources = best.argsort(descending=True)[:r].tolist()
                staying = [place for place in range(len(first)) if place not in sources]
                new = torch.empty(len(x), dtype=torch.long)
                for place, old in enumerate([*(first[place] for place in staying), *second]):
                    new[old] = place
                for place in sources:
                    new[first[place]] = new[second[target[place]]]
                total = torch.zeros(len(x) - r).double().index_add(0, new, size)
                x = torch.zeros(len(x) - r, sizes.dim).double().index_add(0, new, x * size[:, None]) / total[:, None]
                size, group = total, new[group]
                found.setdefault(f"map_{next(number)}", []).append(new.numpy())
                effective.append(r)
            x = x + vit.mlp(block, x)
        found.setdefault("final_group", []).append(group.numpy())
        found.setdefault("final_size", []).append(np.bincount(group))
        found.setdefault("logits", []).append(vit.classify(x[0]).numpy())
    case = {
        "model": {
            "img_size": sizes.image,
            "num_heads": sizes.heads,
            "norm_eps": 1e-6,
            "distilled": False,
            "mae_global_pool": False,
        },
        "settings": {"r_per_layer": several, "prop_attn": True},
        "effective_r": effective,
        "tokens_out": sizes.patches + 1 - sum(effective),
        "weights": {"seed": seed, "scale": 1.0, "manifest": sizes.manifest()},
        "input": {"batch": 2, "size": sizes.image, "seed": seed},
        "checks": {"f32_f64_maxabs": 0.0},
    }
    write(folder / "tome", "one_channel", case, {key: np.stack(rows) for key, rows in found.items()})


# ---- T2T


def t2t(folder: Path) -> None:
    """Two channels, tokens of 6 channels inside the stem, and 12 outside."""
    for tokens_type in ("performer", "transformer"):
        _t2t(folder, tokens_type)


def _t2t(folder: Path, tokens_type: str) -> None:
    channels, size, dim, seed = 2, 6, 12, 2
    manifest: Shapes = {}
    for number, received in (("1", channels * 49), ("2", size * 9)):
        start = f"attention{number}"
        shapes = {"norm1.weight": [received], "norm1.bias": [received], "norm2.weight": [size], "norm2.bias": [size]}
        if tokens_type == "performer":
            shapes |= {"w": [size // 2, size], "kqv.weight": [3 * size, received], "kqv.bias": [3 * size]}
            layers = ("proj", "mlp.0", "mlp.2")
        else:
            shapes |= {"attn.qkv.weight": [3 * size, received]}
            layers = ("attn.proj", "mlp.fc1", "mlp.fc2")
        for layer in layers:
            shapes |= {f"{layer}.weight": [size, size], f"{layer}.bias": [size]}
        manifest |= {f"{start}.{key}": shape for key, shape in shapes.items()}
    manifest |= {"project.weight": [dim, size * 9], "project.bias": [dim]}
    state = wide(manifest, seed)
    x = torch.from_numpy(weights.images(2, 32, seed, channels)).double()
    split = unfold(x, 7, padding=2, stride=4).mT
    arrays = {"soft_split0_slice": split[:, :3].float(), "attention1": _token_attention(state, "attention1", split)}
    x = arrays["attention1"].mT.unflatten(2, (8, 8))
    arrays["attention2"] = _token_attention(state, "attention2", unfold(x, 3, padding=1, stride=2).mT)
    x = unfold(arrays["attention2"].mT.unflatten(2, (4, 4)), 3, padding=1, stride=2).mT
    arrays["out"] = linear(x, state["project.weight"], state["project.bias"])
    case = {
        "kind": "t2t_module",
        "config": {"img_size": 32, "tokens_type": tokens_type},
        "manifest": manifest,
        "weights": {"seed": seed, "scale": 1.0, "overrides": []},
        "input": {"batch": 2, "size": 32, "seed": seed},
    }
    write(folder / "adavit", f"stem_{tokens_type}", case, arrays)


def _token_attention(state: Mapping[str, Tensor], start: str, x: Tensor) -> Tensor:
    """(B, n, a) -> (B, n, e), whose skip is the values."""
    part = ViT({key.removeprefix(f"{start}."): value for key, value in state.items()}, 1, 1e-5)
    received = part.norm("norm1", x)
    if "kqv.weight" in part.state:
        k, q, v = part.linear("kqv", received).chunk(3, dim=-1)
        w = part.state["w"]

        def features(u: Tensor) -> Tensor:
            return torch.exp(u @ w.T - u.square().sum(dim=-1, keepdim=True) / 2) / len(w) ** 0.5

        pairs = features(q) @ features(k).mT  # (B, n, n), though a performer never makes them
        z = v + part.linear("proj", pairs @ v / (pairs.sum(dim=-1, keepdim=True) + 1e-8))
        return z + part.linear("mlp.2", gelu(part.linear("mlp.0", part.norm("norm2", z))))
    q, k, v = part.linear("attn.qkv", received).chunk(3, dim=-1)
    z = v + part.linear("attn.proj", (q @ k.mT * x.shape[-1] ** -0.5).softmax(dim=-1) @ v)
    return z + part.linear("mlp.fc2", gelu(part.linear("mlp.fc1", part.norm("norm2", z))))


# ---- AdaViT


def adavit(folder: Path, seed: int = 4) -> None:
    """All three policies on a ViT of four channels with a representation layer."""
    sizes = Sizes(channels=4, dim=24, heads=4, head_dim=6, hidden=48, classes=5)
    manifest: Shapes = {}
    for key, shape in sizes.manifest().items():
        if ".qkv." in key:
            for name in ("query", "key", "value"):
                manifest[key.replace("qkv", name)] = [shape[0] // 3, *shape[1:]]
        else:
            manifest[key] = shape
    for block in range(sizes.depth):
        policies = {"attn.token_select": 1} | ({"head_select": sizes.heads, "layer_select": 2} if block else {})
        for name, size in policies.items():
            manifest[f"blocks.{block}.{name}.mlp_head.weight"] = [size, sizes.dim]
            manifest[f"blocks.{block}.{name}.mlp_head.bias"] = [size]
    state = wide(manifest, seed)
    state["cls_token"] = state["cls_token"] * 0.25
    for block in range(sizes.depth):
        for part in ("weight", "bias"):
            thirds = [state[f"blocks.{block}.attn.{name}.{part}"] for name in ("query", "key", "value")]
            state[f"blocks.{block}.attn.qkv.{part}"] = torch.cat(thirds)
    vit = ViT(state, sizes.heads)
    found: dict[str, list[Any]] = {}
    for image in images_of(sizes, 3, seed):
        x, decided = vit.embed(image), {"head": [], "layer": [], "token": []}
        for block in range(sizes.depth):
            start = f"blocks.{block}"
            heads, sublayers = torch.ones(sizes.heads).double(), torch.ones(2).double()
            if block:
                heads, sublayers = (
                    (vit.linear(f"{start}.{name}_select.mlp_head", x[0]) > 0).double() for name in ("head", "layer")
                )
                decided["head"].append(heads)
                decided["layer"].append(sublayers)
            odds = vit.linear(f"{start}.attn.token_select.mlp_head", vit.norm(f"{start}.norm1", x[1:]))[:, 0]
            tokens = torch.cat([torch.ones(1).double(), (odds > math.log(1.5)).double()])
            decided["token"].append(tokens)
            on, channels = tokens.bool(), heads.repeat_interleave(sizes.head_dim)
            q, k, v = vit.project(block, x[on])
            mixed = vit.logits(q, k).softmax(dim=-1) @ v * heads[:, None, None]
            after = x.clone()
            after[on] += sublayers[0] * vit.merge(block, mixed)
            hidden = linear(
                vit.norm(f"{start}.norm2", after[on]) * channels,
                state[f"{start}.mlp.fc1.weight"],
                state[f"{start}.mlp.fc1.bias"],
            )
            after[on] += sublayers[1] * vit.linear(f"{start}.mlp.fc2", gelu(hidden))
            x = after
        for name, rows in decided.items():
            found.setdefault(f"{name}_select", []).append(torch.stack(rows))
        found.setdefault("logits", []).append(vit.classify(x[0]))
    case = {
        "name": "four_channels",
        "kind": "eval",
        "config": {
            "use_t2t": False,
            "img_size": sizes.image,
            "num_heads": sizes.heads,
            "ln_eps": 1e-6,
            "ada_head": True,
            "ada_layer": True,
            "ada_token": True,
            "ada_token_with_mlp": True,
            "keep_layers": 1,
        },
        "manifest": manifest,
        "weights": {
            "seed": seed,
            "scale": 1.0,
            "overrides": [{"match": "cls_token", "op": "mul", "value": 0.25}],
        },
        "input": {"batch": 3, "size": sizes.image, "seed": seed},
    }
    write(folder / "adavit", "four_channels", case, {key: torch.stack(rows) for key, rows in found.items()})


def table_of_macs(folder: Path) -> None:
    """GMACs of a block of 32 channels, 4 heads and an MLP of 3 times as many, over 10 tokens, spelt out."""
    dim, heads, tokens, hidden = 32, 4, 10, 96
    values = np.zeros((heads + 1, tokens + 1, 2, 2))
    for on in range(1, heads + 1):
        for left in range(1, tokens + 1):
            t, w = float(int(np.float32(tokens) * (np.float32(left) / np.float32(tokens)))), 8 * on
            attention = 5 * tokens * dim + 3 * t * dim * w + 2 * t * t * w + t * w * w
            mlp = t * (w * hidden + hidden * dim)
            values[on, left] = [[0, mlp], [attention, attention + mlp]]
            values[on, left] += 5 * tokens * dim
    case = {"axes": ["heads", "tokens", "attention", "mlp"], "values": (values / 1e9).astype(np.float32).tolist()}
    (folder / "adavit").mkdir(parents=True, exist_ok=True)
    (folder / "adavit" / "flops_dict_small.json").write_text(json.dumps(case))


# ---- ATS, released


def ats(folder: Path, seed: int = 6) -> None:
    """Three channels of four, a representation layer and logits taken times 0.2, in the three modes."""
    sizes, blocks = Sizes(channels=4, heads=2, head_dim=8, image=20), [1, 2]
    vit = ViT(wide(sizes.manifest(), seed, 1.5), sizes.heads, scale=0.2)
    arrays: dict[str, Any] = {}
    layers: dict[str, list[dict[str, Any]]] = {}
    pictures, slots = images_of(sizes, 3, seed), sizes.patches + 1
    macs: dict[str, Any] = {"dense": _dense(sizes)}
    for mode in ("prune", "mask", "single"):
        xs, ids = [vit.embed(picture) for picture in pictures], [list(range(slots)) for _ in pictures]
        layers[mode], cost = [], [_dense(sizes) for _ in pictures]
        for block in range(sizes.depth):
            most, scores = max(map(len, ids)), []
            before = [len(row) for row in ids]
            for number, x in enumerate(xs):
                q, k, v = vit.project(block, x)
                length = {"prune": most, "mask": slots, "single": len(x)}[mode]
                masked = {"prune": most > len(x), "mask": slots > len(x), "single": False}[mode]
                logits = vit.logits(q, k)
                grown = (logits - logits.amax(dim=-1, keepdim=True)).exp()
                attention = (grown + 1e-6 / length) / (grown.sum(dim=-1, keepdim=True) + 1e-6)
                kept = list(range(len(x)))
                if block in blocks:
                    score = attention[:, 0, 1:].sum(dim=0) * v[:, 1:].transpose(0, 1).flatten(1).norm(dim=1)
                    score = score / score.sum()
                    scores.append(score)
                    kept = [0, *(1 + place for place in _sampled(score, slots - 1, masked))]
                x = x[kept] + vit.merge(block, attention[:, kept] @ v)
                xs[number] = x + vit.mlp(block, x)
                ids[number] = [ids[number][place] for place in kept]
                n, m = before[number], len(kept)
                cost[number] += _block(sizes, n, m) - _block(sizes, slots, slots)
            if block in blocks:
                layers[mode].append({"block": block, "ids": [*ids], "counts": [len(row) for row in ids]})
                if mode == "prune":
                    padded = np.zeros((len(pictures), most - 1))
                    for number, score in enumerate(scores):
                        padded[number, most - 1 - len(score) :] = score.sort().values
                    arrays[f"prune_block{block}_scores_sorted"] = padded
        arrays[f"{mode}_logits"] = torch.stack([vit.classify(x[0]) for x in xs])
        macs[{"prune": "prune_ideal_per_image", "single": "single_per_image"}.get(mode, "")] = cost
    case = {
        "kind": "official_model",
        "config": {
            "IMG_SIZE": sizes.image,
            "NUM_HEADS": sizes.heads,
            "QK_SCALE": 0.2,
            "REPRESENTATION_SIZE": sizes.representation,
            "ATS_BLOCKS": blocks,
        },
        "layernorm_eps": 1e-6,
        "manifest": sizes.manifest(),
        "weights": {"seed": seed, "scale": 1.5},
        "input": {"batch": len(pictures), "size": sizes.image, "seed": seed},
        "layers": layers,
        "tolerance": {"scores_rel": 1e-4},
        "macs": macs,
    }
    write(folder / "ats", "scaled", case, arrays)


def _sampled(score: Tensor, points: int, padded: bool) -> list[int]:
    """Places of what the released grid lands on, the least first."""
    order = score.argsort()
    cumulative = score[order].cumsum(dim=0)
    if not padded:
        cumulative = cumulative - cumulative[0]
    cumulative = cumulative / cumulative[-1]
    least = cumulative[cumulative > 0][0]
    hit = {int((least + (1 - least) * j / (points - 1) - cumulative).abs().argmin()) for j in range(points)}
    return [int(order[place]) for place in sorted(hit)]


def _block(sizes: Sizes, n: int, m: int) -> int:
    """MACs as the released code makes them: n tokens come in, m are kept."""
    width, dim = sizes.heads * sizes.head_dim, sizes.dim
    return 3 * n * dim * width + n * n * width + m * n * width + m * width * dim + 2 * m * dim * sizes.hidden


def _dense(sizes: Sizes) -> int:
    stem = sizes.patches * sizes.patch**2 * sizes.channels * sizes.dim
    head = sizes.dim * (sizes.representation or 0) + (sizes.representation or sizes.dim) * sizes.classes
    return stem + sizes.depth * _block(sizes, sizes.patches + 1, sizes.patches + 1) + head


# ---- ATS, vit-pytorch's and the one in Flax


def lucidrains(folder: Path, seed: int = 7) -> None:
    """A ViT that samples nothing, of two channels, patches of 4 x 2 pixels, and 3 heads of 6 channels on 16."""
    dim, heads, size, hidden, depth, classes, channels, height, width = 16, 3, 6, 24, 2, 5, 2, 4, 2
    patches, pixels = (8 // height) * (8 // width), channels * height * width
    manifest: Shapes = {"pos_embedding": [1, patches + 1, dim], "cls_token": [1, 1, dim]}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        manifest[f"{name}.weight"] = [*shape]
        manifest.update({f"{name}.bias": [shape[0]]} if bias else {})

    for part, shape in ((1, (pixels,)), (2, (dim, pixels)), (3, (dim,))):
        add(f"to_patch_embedding.{part}", *shape)
    for layer in range(depth):
        start = f"transformer.layers.{layer}"
        add(f"{start}.0.norm", dim)
        add(f"{start}.0.to_qkv", 3 * heads * size, dim, bias=False)
        add(f"{start}.0.to_out.0", dim, heads * size)
        add(f"{start}.1.net.0", dim)
        add(f"{start}.1.net.1", hidden, dim)
        add(f"{start}.1.net.4", dim, hidden)
    add("mlp_head.0", dim)
    add("mlp_head.1", classes, dim)
    vit = ViT(wide(manifest, seed), heads, 1e-5)
    batch = torch.from_numpy(weights.images(2, 8, seed, channels)).double().requires_grad_()
    logits = []
    for image in batch:
        rows = [
            image[:, row : row + height, column : column + width].permute(1, 2, 0).flatten()
            for row in range(0, 8, height)
            for column in range(0, 8, width)
        ]
        x = vit.linear("to_patch_embedding.2", vit.norm("to_patch_embedding.1", torch.stack(rows)))
        x = torch.cat([vit.state["cls_token"][0], vit.norm("to_patch_embedding.3", x)]) + vit.state["pos_embedding"][0]
        for layer in range(depth):
            start = f"transformer.layers.{layer}"
            qkv = vit.linear(f"{start}.0.to_qkv", vit.norm(f"{start}.0.norm", x))
            q, k, v = qkv.unflatten(-1, (3, heads, size)).permute(1, 2, 0, 3)
            mixed = vit.logits(q, k).softmax(dim=-1) @ v
            x = x + vit.linear(f"{start}.0.to_out.0", mixed.transpose(0, 1).flatten(1))
            x = x + vit.linear(
                f"{start}.1.net.4", gelu(vit.linear(f"{start}.1.net.1", vit.norm(f"{start}.1.net.0", x)))
            )
        logits.append(vit.linear("mlp_head.1", vit.norm("mlp_head.0", x[0])))
    cotangent = torch.linspace(-1, 1, 2 * classes).double().reshape(2, classes)
    (gradient,) = torch.autograd.grad((torch.stack(logits) * cotangent).sum(), [batch])
    arrays = {
        "logits": torch.stack(logits),
        "token_ids": np.tile(np.arange(patches), (2, 1)),
        "grad_cotangent": cotangent,
        "grad_image0_ch0": gradient[0, 0],
        "grad_image_l2": gradient.flatten(1).norm(dim=1),
    }
    case = {
        "kind": "lucidrains_model",
        "config": {
            "image_size": 8,
            "patch_size": [height, width],
            "num_classes": classes,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "mlp_dim": hidden,
        },
        "calls": [],
        "manifest": manifest,
        "weights": {"seed": seed, "scale": 1.0},
        "input": {"batch": 2, "size": 8, "seed": seed},
    }
    write(folder / "ats", "wide_heads", case, arrays)


def flax(folder: Path, seed: int = 8) -> None:
    """A ViT that samples nothing, of two channels, with its 2 heads of 64 channels on 16."""
    dim, heads, hidden, depth, classes, channels, patch, side = 16, 2, 24, 2, 5, 2, 4, 8
    patches, pixels = (side // patch) ** 2, channels * patch**2
    manifest: Shapes = {"pos_embedding": [1, patches + 1, dim], "cls": [1, 1, dim]}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        manifest[f"{name}/kernel"] = [*shape]
        manifest.update({f"{name}/bias": [shape[1]]} if bias else {})

    add("Dense_0", pixels, dim)
    for layer in range(depth):
        start = "Transformer_0"
        manifest[f"{start}/PreNorm_{2 * layer}/LayerNorm_0/scale"] = [dim]
        add(f"{start}/Attention_{layer}/Dense_0", dim, 3 * heads * 64, bias=False)
        add(f"{start}/Attention_{layer}/Dense_1", heads * 64, dim)
        manifest[f"{start}/PreNorm_{2 * layer + 1}/LayerNorm_0/scale"] = [dim]
        add(f"{start}/FeedForward_{layer}/Dense_0", dim, hidden)
        add(f"{start}/FeedForward_{layer}/Dense_1", hidden, dim)
    manifest["LayerNorm_0/scale"] = [dim]
    add("Dense_1", dim, classes)
    state: dict[str, Tensor] = {}
    for path, shape in manifest.items():
        *scopes, end = path.split("/")
        name = ".".join([*scopes, {"kernel": "weight", "scale": "weight"}.get(end, end)])
        value = weights.tensor(name, shape[::-1] if end == "kernel" else shape, seed, 1.0)
        state[path] = torch.from_numpy(value).double()

    def dense(name: str, x: Tensor) -> Tensor:
        return linear(x, state[f"{name}/kernel"], state.get(f"{name}/bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, (dim,), state[f"{name}/LayerNorm_0/scale" if name else "LayerNorm_0/scale"], None, 1e-5)

    logits = []
    for image in torch.from_numpy(weights.images(2, side, seed, channels)).double():
        rows = [
            image[:, row : row + patch, column : column + patch].permute(1, 2, 0).flatten()
            for row in range(0, side, patch)
            for column in range(0, side, patch)
        ]
        x = torch.cat([state["cls"][0], dense("Dense_0", torch.stack(rows))]) + state["pos_embedding"][0]
        for layer in range(depth):
            start = "Transformer_0"
            qkv = dense(f"{start}/Attention_{layer}/Dense_0", norm(f"{start}/PreNorm_{2 * layer}", x))
            q, k, v = qkv.unflatten(-1, (3, heads, 64)).permute(1, 2, 0, 3)
            mixed = (q @ k.mT / 8).softmax(dim=-1) @ v
            x = x + dense(f"{start}/Attention_{layer}/Dense_1", mixed.transpose(0, 1).flatten(1))
            inner = dense(f"{start}/FeedForward_{layer}/Dense_0", norm(f"{start}/PreNorm_{2 * layer + 1}", x))
            x = x + dense(f"{start}/FeedForward_{layer}/Dense_1", gelu(inner, approximate="tanh"))
        logits.append(dense("Dense_1", norm("", x[0])))
    case = {
        "kind": "flax_model",
        "config": {
            "image_size": side,
            "patch_size": patch,
            "num_classes": classes,
            "dim": dim,
            "depth": depth,
            "max_tokens_per_depth": [patches] * depth,
            "heads": heads,
            "mlp_dim": hidden,
            "dropout": 0.0,
            "emb_dropout": 0.0,
        },
        "calls": [],
        "manifest": manifest,
        "weights": {"seed": seed, "scale": 1.0},
        "input": {"batch": 2, "size": side, "seed": seed},
    }
    ids = np.tile(np.arange(patches), (2, 1))
    write(folder / "ats", "flax_two_channels", case, {"logits": torch.stack(logits), "token_ids": ids})


# ---- A-ViT


def avit(folder: Path, seed: int = 9) -> None:
    """A training pass of three images of five channels through a ViT with a representation layer."""
    sizes, scale, center, eps, weigh, alpha, peak = Sizes(channels=5, heads=2), 5.0, 1.5, 0.01, 5e-4, 0.01, 2
    vit = ViT({key: value.requires_grad_() for key, value in wide(sizes.manifest(), seed, 2.0).items()}, sizes.heads)
    tokens, depth, found = sizes.patches + 1, sizes.depth, {"h": [], "active": [], "rho": [], "counter": []}
    logits = []
    for image in images_of(sizes, 3, seed):
        x, out = vit.embed(image), torch.zeros(sizes.dim).double()
        live, total, rest = (torch.ones(tokens).double(), torch.zeros(tokens).double(), torch.ones(tokens).double())
        rho, counter, raw, active = torch.zeros(tokens).double(), torch.zeros(tokens), [], []
        for block in range(depth):
            active.append(live)
            x = x + (x * live[:, None] - x).detach()  # the released code writes to the data, past the gradients
            q, k, v = vit.project(block, x, live)
            x = x + vit.merge(block, (vit.logits(q, k) - 1000 * (1 - live)).softmax(dim=-1) @ v)
            x = x + vit.mlp(block, x, live)
            score = torch.sigmoid(scale * x[:, 0] - center)
            raw.append(score)
            score = torch.ones_like(score) if block == depth - 1 else score
            total = total + score
            going = live * (total < 1 - eps)
            reached = live * (total >= 1 - eps)
            out = out + x[0] * (rest * reached + score * going)[0]
            rho = rho + live + rest * reached
            counter = counter + live
            rest = rest - score * going
            live = going.detach()
        logits.append(vit.classify(out))
        for name, value in (
            ("h", torch.stack(raw)),
            ("active", torch.stack(active)),
            ("rho", rho),
            ("counter", counter),
        ):
            found[name].append(value)
    arrays = {"logits": torch.stack(logits), "rho": torch.stack(found["rho"]), "counter": torch.stack(found["counter"])}
    arrays |= {name: torch.stack(found[name], dim=1) for name in ("h", "active")}
    density = torch.exp(-((torch.arange(depth) - peak) ** 2).double() / 2)
    target = density * 0.98 / density[:peak].sum()
    mean = arrays["h"][:, 1:].mean(dim=(1, 2))  # the slice is on the wrong axis: it leaves out an image
    share = (mean / mean.sum()).clamp(0.01, 0.99)
    arrays |= {"distr_target": target, "halting_score_layer": mean}
    labels = [(7 * number + 3) % sizes.classes for number in range(3)]
    losses = {
        "ce": cross_entropy(arrays["logits"], torch.tensor(labels)),
        "ponder": weigh * arrays["rho"].mean(),
        "distr": alpha * (target * (target.log() - share.log())).mean(),
    }
    losses["total"] = sum(losses.values())
    norms = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, list(vit.state.values()), retain_graph=True, allow_unused=True)
        norms[name] = {
            key: None if gradient is None else gradient.norm().item()
            for key, gradient in zip(vit.state, gradients, strict=True)
        }
    case = {
        "model_config": {"num_heads": sizes.heads},
        "img_size": sizes.image,
        "gate_scale": scale,
        "gate_center": center,
        "eps": eps,
        "ponder_token_scale": weigh,
        "distr_prior_alpha": alpha,
        "target_depth": peak,
        "mode": "train",
        "manifest": sizes.manifest(),
        "seed": seed,
        "scale": 2.0,
        "batch": 3,
        "image_seed": seed,
        "labels": labels,
        "losses": {name: loss.item() for name, loss in losses.items()} | {"distr_added": True},
        "grad_norms": norms,
        "fp32_vs_fp64": {"logits_max_abs": 0.0, "rho_max_abs": 0.0},
    }
    write(folder / "avit", "five_channels", case, arrays)


RECORDERS: dict[str, Callable[[Path], None]] = {
    "avit_case": avit,
    "adavit_evaluated": adavit,
    "adavit_table": table_of_macs,
    "t2t_module": t2t,
    "ats_official": ats,
    "lucidrains_case": lucidrains,
    "flax_case": flax,
    "dynamicvit_evaluated": dynamicvit,
    "evit_case": evit,
    "tome_case": tome,
}
"""By the kind of what they write."""
