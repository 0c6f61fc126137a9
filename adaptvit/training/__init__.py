"""Recipes, the loop, and a training from start to end."""
