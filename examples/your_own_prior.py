"""A prior of your own for A-ViT's halting depth: one function and one row.

Run it: python examples/your_own_prior.py
"""

import timm
import torch
from torch import Tensor
from torch.nn.functional import softplus

import adaptvit
from adaptvit.methods.priors import PRIORS, halting_prior


def logistic(depths: Tensor, target: float, scale: float) -> Tensor:
    """The logarithm of a logistic density, up to a constant: a normal's shape, a Laplace's tails."""
    z = (depths - target) / scale
    return -z - 2 * softplus(-z)


PRIORS["logistic"] = logistic


def main() -> None:
    """Show the prior, alone and mixed with another, and the loss that it gives."""
    for name in ("gaussian", "logistic"):
        shares = "".join(f"{share:6.1%}" for share in halting_prior(name, depth=12, target=9).tolist())
        print(f"{name:>9}: {shares}")

    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=48)
    images = torch.randn(8, 3, 64, 64)
    single = adaptvit.AViTConfig(gate_center=2, prior="logistic", prior_depth=9)
    mixed = adaptvit.AViTConfig(
        gate_center=2, prior=("logistic", "gaussian"), prior_depth=(3, 10), prior_weights=(0.7, 0.3)
    )
    for config in (single, mixed):
        loss = config.build(vit)(images, detailed=True).terms["prior"]
        print(f"prior {config.prior}, depth {config.prior_depth}: loss {loss:.2e}")


if __name__ == "__main__":
    main()
