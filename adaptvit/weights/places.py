"""Where a model's weights lie: a file, a folder in the Hub's format, or a repository of the Hub."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from adaptvit.backbones.processors import FILES
from adaptvit.terminal import meant
from adaptvit.weights.tensorfiles import existing, reason

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
"""Of files with weights: a name that ends so is never a model's."""
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
"""What stands before a repository of the Hub, or before a folder with the files of one."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Where such a folder has its weights; the first that is there."""


def of_model(stored: str, model: str) -> str:
    """The name of weights that do not say whose they are: `MODEL=STORED`, which `told_model` takes apart.

    Raises:
        ValueError: timm has no such model.
    """
    if not timm.is_model(model):
        raise ValueError(f"--model must be timm's name of a model, got {model!r}{meant(model, timm.list_models())}")
    return f"{model}={stored}"


def told_model(name: Path | str) -> tuple[str | None, str]:
    """The timm model that a name says weights are of, None where it does not, and the name of the weights."""
    model, equals, stored = str(name).partition("=")
    return (model, stored) if equals and timm.is_model(model) else (None, str(name))


def is_stored(name: Path | str) -> bool:
    """Whether a model's name is of a file, folder or repository, which hold its weights; else it is timm's to know."""
    model, word = told_model(name)
    if model is not None:
        return True
    path = Path(word)
    if word.startswith(HUBS):
        return True
    if path.is_dir():
        return any((path / file).exists() for file in HUB_FILES) or not timm.is_model(word)
    return path.exists() or path.suffix.lower() in SUFFIXES


def weights_file(name: Path | str) -> Path:
    """The file with the weights that a file's, a folder's or a repository's name stands for; downloaded if need be.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be downloaded, or is no ordinary file.
    """
    _, word = told_model(name)
    source = next((source for source in HUBS if word.startswith(source)), "")
    if source not in ("", "local-dir:"):
        return existing(_downloaded(word.removeprefix(source)))
    path = Path(word.removeprefix(source))
    if not source and not path.is_dir():
        return existing(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{word}: there is no folder {str(path)!r}")
    found = [path / file for file in HUB_FILES if (path / file).exists()]
    if not found:
        raise FileNotFoundError(f"{str(path)!r} is a folder without weights: none of {', '.join(HUB_FILES)} is in it")
    return existing(found[0])


@contextmanager
def asked_of_the_hub() -> Iterator[str]:
    """Where the Hub cannot be reached, its client looks among what it has here, rather than try again for minutes.

    Yields:
        Why it cannot be reached; empty where it may be.
    """
    host, before = urlsplit(constants.ENDPOINT).hostname, constants.HF_HUB_OFFLINE
    why = ""
    if not before and not getproxies():  # through which names are found elsewhere
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            why = f"there is no way to {host} from here"
    constants.HF_HUB_OFFLINE = bool(before or why)
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = before


def _downloaded(name: str) -> Path:
    """The weights of a repository, `OWNER/NAME` or `OWNER/NAME@REVISION`, where the Hub's client keeps them.

    Raises:
        ValueError: it is neither here nor can it be downloaded.
    """
    repository, _, revision = name.partition("@")
    unseen: Exception | None = None
    with asked_of_the_hub() as unreachable:
        try:
            for file in HUB_FILES:
                try:
                    found = Path(hf_hub_download(repository, file, revision=revision or None))
                except LocalEntryNotFoundError as error:  # no network: one of the others may be here
                    unseen = error
                except EntryNotFoundError:
                    pass
                else:
                    for beside in ("config.json", *FILES):
                        with suppress(EntryNotFoundError):  # which our own files do without
                            hf_hub_download(repository, beside, revision=revision or None)
                    return found
        except Exception as error:  # the Hub's client raises a dozen kinds
            unseen = error
    if unseen is None:
        raise ValueError(f"hf-hub:{name} has no weights: none of {', '.join(HUB_FILES)} is in it")
    raise ValueError(
        f"hf-hub:{name} is not here and cannot be downloaded ({unreachable or reason(unseen)}): where there is no "
        "network, bring the repository's files in a folder and name it as local-dir:FOLDER"
    ) from unseen
