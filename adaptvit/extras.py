"""Libraries that only a part of the package needs, and what to install where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    "accelerate": "train",
    "av": "video",
    "datasets": "data",
    "fastapi": "serve",
    "gradio": "playground",
    "jinja2": "pictures",
    "jsonargparse": "cli",
    "matplotlib": "pictures",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "prometheus_client": "serve",
    "pyarrow": "ray",
    "ray": "ray",
    "sklearn": "data",
    "tensorboard": "track",
    "uvicorn": "serve",
}
"""The extra of `pyproject.toml` that brings each of them, by the name that is imported."""
PACKAGES = {"sklearn": "scikit-learn"}
"""What is installed, where that is called otherwise than what is imported."""


class MissingLibrary(ModuleNotFoundError):
    """A library of `EXTRAS` is not there: who needs it, and how it comes."""

    def __init__(self, by: str, library: str) -> None:
        name = PACKAGES.get(library, library)
        super().__init__(f"{by} needs {name}: pip install 'adaptvit[{EXTRAS[library]}]'", name=library)


@contextmanager
def needed(by: str) -> Iterator[None]:
    """Around imports: `by`, a noun, is said to need what of `EXTRAS` is missing.

    Raises:
        MissingLibrary: one is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in EXTRAS:
            raise
        raise MissingLibrary(by, library) from None
