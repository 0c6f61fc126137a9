"""A block's linear maps in part: some output or input channels, and not the others while the map is a plain one.

Whatever somebody has put in the place of a map, or on it (LoRA, pruning, parametrisations, quantised weights, hooks),
is called whole, so that it acts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def is_plain(layer: nn.Module) -> bool:
    """Whether a call does no more than `linear` with the layer's own weight and bias."""
    return type(layer) is nn.Linear and not is_hooked(layer)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody sees or changes what a call of the module takes, gives or passes backwards."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def some_outputs(layer: nn.Module, x: Tensor, channels: slice) -> Tensor:
    """Some output channels of a map of (..., channels in)."""
    if not is_plain(layer):
        out: Tensor = layer(x)
        return out[..., channels]
    assert isinstance(layer, nn.Linear)
    if channels == slice(None):  # not a view of the weight, which tools that quantise files pass over
        return linear(x, layer.weight, layer.bias)
    return linear(x, layer.weight[channels], None if layer.bias is None else layer.bias[channels])


def some_inputs(layer: nn.Module, x: Tensor, channels: Sequence[slice]) -> Tensor:
    """A map of (T, channels in), of which only these ranges, one at least, are not 0."""
    if not is_plain(layer):
        kept = torch.zeros_like(x)
        for some in channels:
            kept[:, some] = x[:, some]
        whole: Tensor = layer(kept)
        return whole
    assert isinstance(layer, nn.Linear)
    first, *others = channels
    out = linear(x[:, first], layer.weight[:, first], layer.bias)
    for some in others:
        if torch.is_autocast_enabled(x.device.type):  # it does not reach operations in place
            out = out + linear(x[:, some], layer.weight[:, some])
        else:
            torch.addmm(out, x[:, some], layer.weight[:, some].t(), out=out)  # addmm_ is one that torch does not count
    return out


def of_nothing(layer: nn.Module, like: Tensor, width: int) -> Tensor:
    """What a map gives where all its inputs are 0: (1, channels out), or 0 for all channels, (1, 1).

    Args:
        like: features of the precision and device of its inputs.
        width: channels in.
    """
    if not is_plain(layer):
        given: Tensor = layer(like.new_zeros(1, width))
        return given
    assert isinstance(layer, nn.Linear)
    return like.new_zeros(1, layer.out_features) if layer.bias is None else layer.bias[None]
