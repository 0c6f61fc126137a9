"""`adaptvit convert`: published weights in a file of ours."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from adaptvit.files import check_output
from adaptvit.terminal import say
from adaptvit.weights.published import convert


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit convert SOURCE TARGET MODEL_NAME`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Turn published A-ViT, AdaViT, EViT, DynamicViT, DeiT, T2T-ViT or timm weights into one file.",
    )
    parser.add_function_arguments(convert, as_positional=True)
    return parser


def execute(arguments: Namespace) -> None:
    """Write the file and say what it has that was not in the tensors."""
    check_output(arguments.target)
    config = convert(**arguments.as_dict()).config
    names = [name for name in ("gate_scale", "gate_center", "keep_rate", "fuse") if hasattr(config, name)]
    told = [f"{name} {getattr(config, name)}" for name in names]
    say(", ".join([f"{arguments.target}: {arguments.model_name}", *told]))
