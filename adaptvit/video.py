"""Clips: an image ViT that takes them."""

from adaptvit.backbones.video import SpaceTimeViT, inflate

__all__ = ["SpaceTimeViT", "inflate"]
