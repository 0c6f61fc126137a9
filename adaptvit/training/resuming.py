"""What a training leaves and goes on from: checkpoints of the last two epochs and within the present one, its log."""

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adaptvit.files import as_json, replacing, write_atomically
from adaptvit.terminal import warn
from adaptvit.training.recipe import Epoch
from adaptvit.weights.tensorfiles import existing, read_torch, reason


class Checkpoints:
    """The files of one training in a folder, which other trainings may share.

    Attributes:
        last: the checkpoint that was read or written last; None before.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.output = output
        self.checkpoint, self.log = output / f"checkpoint-{key}.pt", output / f"log-{key}.jsonl"
        self.previous = output / f"previous-{key}.pt"
        self.part = output / f"part-{key}.pt"
        self.last: Path | None = None

    @property
    def are_there(self) -> bool:
        """Whether there is something to go on from."""
        return self.checkpoint.exists() or self.previous.exists() or self.part.exists()

    def tell_of_others(self) -> None:
        """Say so where there is something to go on with, but not of this training."""
        others = sorted(path.name for path in self.output.glob("checkpoint-*.pt"))
        if others:
            warn(
                f"nothing in {str(self.output)!r} is of this very run, which begins afresh: {', '.join(others)} is of "
                "other settings, weights or images, or of another version of adaptvit",
                stacklevel=5,
            )

    def write(self, state: dict[str, Any], history: Sequence[Epoch]) -> None:
        """Write the checkpoint of the last epoch, and the log; the one before it is kept, under another name.

        Raises:
            OSError: it cannot be written; the one before it stays.
        """
        with self._saved(self.checkpoint, state, history):
            if self.last == self.checkpoint:  # or what is there is damaged, and the previous one better
                os.replace(self.checkpoint, self.previous)
        self.last = self.checkpoint
        self.part.unlink(missing_ok=True)
        self.write_log(history)

    def write_part(self, state: dict[str, Any], history: Sequence[Epoch]) -> None:
        """Write a checkpoint within the epoch after the last of the history, over the one before it.

        Raises:
            OSError: it cannot be written; the one before it stays.
        """
        with self._saved(self.part, state, history):
            pass

    @contextmanager
    def _saved(self, path: Path, state: dict[str, Any], history: Sequence[Epoch]) -> Iterator[None]:
        """A checkpoint beside its place, which it takes when the block ends."""
        with replacing(path) as partial:
            try:
                torch.save({**state, "history": [asdict(epoch) for epoch in history]}, partial)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(
                    f"{str(path)!r} cannot be written (disk full?), the one before it stays: {reason(error)}"
                ) from error
            yield

    def write_log(self, history: Sequence[Epoch]) -> None:
        """Write a line for each epoch."""
        write_atomically(self.log, "".join(as_json(asdict(epoch)) + "\n" for epoch in history))

    def read(self, epochs: int, tells: bool) -> dict[str, Any] | None:
        """The last checkpoint of a whole epoch, or the one before it where that is damaged; None where there is none.

        Its `history` is made of `Epoch`s.

        Args:
            epochs: of the whole training.
            tells: whether this process warns where a checkpoint is damaged.
        Raises:
            ValueError: neither can be read; or the training was finished, which its last checkpoint alone can tell.
        """
        faults = []
        for path in (self.checkpoint, self.previous):
            if not path.exists():
                continue
            try:
                saved = read_checkpoint(path)
            except ValueError as error:
                faults.append(str(error))
                continue
            self.last, done = path, len(saved["history"])
            if faults and done + 1 == epochs:
                raise ValueError(
                    f"{faults[0]}; the training was finished, and its model is model.safetensors beside it: remove the "
                    f"damaged file to train epoch {done + 1} again from {path.name}"
                )
            if faults and tells:
                warn(f"{faults[0]}; going on from {path.name}, after epoch {done}", stacklevel=5)
            return saved
        if faults:
            raise ValueError(f"{'; '.join(faults)}: remove what is damaged to train from the start")
        return None

    def read_part(self, done: int, readers: list[int], tells: bool) -> dict[str, Any] | None:
        """The checkpoint within an epoch, where that is the next and these can go on from it; else None.

        Args:
            done: whole epochs.
            readers: processes that train, and that decode for each: others have the images in another order.
            tells: whether this process warns where there is one that is of no use.
        """
        if not self.part.exists():
            return None
        try:
            saved = read_checkpoint(self.part)
        except ValueError as error:
            why = str(error)
        else:
            if len(saved["history"]) != done:  # who wrote it was stopped after the epoch, before it was removed
                return None
            if saved["readers"] == readers:
                return saved
            then, now = ("{} that train, {} that decode for each".format(*of) for of in (saved["readers"], readers))
            why = f"{str(self.part)!r} is of other processes ({then}) than these ({now})"
        if tells:
            warn(f"{why}; epoch {done + 1} begins anew", stacklevel=5)
        return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a training resumes from, on the CPU, its checksums compared.

    torch's file is a zip archive, which has a checksum (CRC-32) of every tensor and of all that says what they are;
    torch itself does not compare them.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        with zipfile.ZipFile(existing(path)) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises BadZipFile, zlib's errors, and what wrong offsets make it stumble on
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{str(path)!r} is damaged: {reason(error)}") from error
    if damaged is not None:
        raise ValueError(f"{str(path)!r} is damaged: the checksum of {damaged} is wrong")
    saved = read_torch(path)
    try:
        history = [Epoch(**epoch) for epoch in saved["history"]]
    except (KeyError, TypeError):
        history = []
    if not history and "readers" not in saved:
        raise ValueError(f"{str(path)!r} is no checkpoint of a training that this adaptvit can go on with")
    return saved | {"history": history}
