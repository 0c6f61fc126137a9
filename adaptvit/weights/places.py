"""Where a model's weights lie: a file, a folder in the Hub's format, or a repository of the Hub."""

from contextlib import suppress
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from adaptvit.backbones.processors import FILES
from adaptvit.weights.tensorfiles import existing, reason

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
"""Of files with weights: a name that ends so is never a model's."""
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
"""What stands before a repository of the Hub, or before a folder with the files of one."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Where such a folder has its weights; the first that is there."""


def is_stored(name: Path | str) -> bool:
    """Whether a model's name is of a file, folder or repository, which hold its weights; else it is timm's to know."""
    word, path = str(name), Path(name)
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
    word = str(name)
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


def _downloaded(name: str) -> Path:
    """The weights of a repository, `OWNER/NAME` or `OWNER/NAME@REVISION`, where the Hub's client keeps them.

    Raises:
        ValueError: it is neither here nor can it be downloaded.
    """
    repository, _, revision = name.partition("@")
    unseen: Exception | None = None
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
        f"hf-hub:{name} is not here and cannot be downloaded ({reason(unseen)}): where there is no network, bring "
        "the repository's files in a folder and name it as local-dir:FOLDER"
    ) from unseen
