"""Adaptive token sampling in JAX: a ViT in Flax linen, apart from the rest of the package, which needs no JAX."""

from adaptvit.flax.ats_vit import Flavour, ViT, check_capacities

__all__ = ["Flavour", "ViT", "check_capacities"]
