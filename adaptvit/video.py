"""Clips: an image ViT that takes them, and how they are read."""

from adaptvit.backbones.video import SpaceTimeViT, inflate
from adaptvit.data.video import Clips, read_clip

__all__ = ["Clips", "SpaceTimeViT", "inflate", "read_clip"]
