"""The batches to train on: which images, in which order, decoded by processes that stay from epoch to epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from adaptvit.data import Data, filled
from adaptvit.process import place, serve
from adaptvit.seeds import begin_stream, stream


def training_loader(data: Data, batch_size: int, pinned: bool) -> DataLoader:
    """The share of this process; what has `set_epoch`, the sampler or the data set, is told of each epoch.

    Args:
        pinned: whether batches are laid where an accelerator copies them from while others are computed.
    Raises:
        ValueError: a stream that several processes cannot share.
    """
    split, (rank, world) = data.train, place()
    sampler: Any = None
    stays = False
    if not isinstance(split, IterableDataset):
        if data.repeats > 1:
            sampler = RepeatAugSampler(split, num_replicas=world, rank=rank, num_repeats=data.repeats)
        else:
            sampler = DistributedSampler(split, num_replicas=world, rank=rank, drop_last=True)
        stays = data.workers > 0 and not hasattr(split, "set_epoch")  # of which a process that stays hears nothing
        if stays:
            split, sampler = _Drawn(split), _Seeded(sampler)
    elif world > 1 and not hasattr(split, "set_epoch"):
        raise ValueError(
            f"{data.name} trains on a stream that {world} processes cannot share: give it set_epoch(seed), from which "
            "on each has images of its own"
        )
    return DataLoader(
        split,
        batch_size,
        sampler=sampler,
        num_workers=data.workers,
        collate_fn=filled,
        drop_last=True,
        worker_init_fn=serve,
        pin_memory=pinned,
        persistent_workers=stays,
        generator=torch.Generator() if stays or sampler is None else None,  # whose seeds no other draw moves
    )


def end(loader: DataLoader) -> None:
    """Have the processes end that stay."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


class _Seeded(Sampler):
    """The order of a sampler, and with each image a seed, which follows from that of the epoch."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.seed = sampler, 0

    def set_epoch(self, seed: int) -> None:
        self.sampler.set_epoch(seed)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank = place()[0]
        for number, index in enumerate(self.sampler):
            yield index, stream("image", self.seed, rank, number)


class _Drawn(Dataset):
    """A split by number and seed: a process that stays has no other beginning of an epoch."""

    def __init__(self, split: Dataset) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)  # type: ignore[arg-type]

    def __getitem__(self, drawn: tuple[int, int]) -> Any:
        index, seed = drawn
        begin_stream("image", seed)
        return self.split[index]
