"""`adaptvit playground`: a local page, pictures through a dense and an adaptive ViT side by side."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from adaptvit.commands.console import config_of
from adaptvit.commands.sessions import PlaygroundConfig


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit playground [MODEL ...]`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Show a page on this machine where pictures go through a dense and an adaptive ViT side by side.",
    )
    parser.add_argument("models", nargs="*", type=str, help="Files, folders, repositories or timm's names of ViTs.")
    parser.add_class_arguments(PlaygroundConfig, skip={"models"})
    return parser


def execute(arguments: Namespace) -> None:
    """Serve the page until stopped."""
    from adaptvit.commands.page import serve_page  # `--help` needs no gradio

    serve_page(config_of(PlaygroundConfig, arguments))
