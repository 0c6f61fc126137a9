"""Somebody else's ViT, whole: what runs its blocks on tokens, and the ViTs and parts that are made here."""
