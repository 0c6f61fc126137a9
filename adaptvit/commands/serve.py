"""`adaptvit serve MODEL`: images in, classes out over HTTP; the budget falls while many wait, and rises again."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from adaptvit.commands.batches import ServeConfig
from adaptvit.commands.console import config_of


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit serve MODEL`."""
    parser = ArgumentParser(
        description="Answer images over HTTP with their classes, at a budget that falls while many wait."
    )
    parser.add_class_arguments(ServeConfig, as_positional=True)
    return parser


def execute(arguments: Namespace) -> None:
    """Answer until stopped."""
    from adaptvit.commands.server import serve_model  # `--help` needs no fastapi

    serve_model(config_of(ServeConfig, arguments))
