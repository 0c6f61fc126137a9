"""What is drawn in one epoch, process or run has nothing to do with what is drawn in another."""

import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from models import small_vit
from torch import Tensor

from adaptvit import FullConfig
from adaptvit.data import Data, Images, open_digits
from adaptvit.seeds import begin_stream, stream
from adaptvit.training.loop import train
from adaptvit.training.recipe import Recipe

GRID = [(seed, epoch) for seed in range(3) for epoch in (1, 2, 3)]


def test_a_stream_is_its_name_and_numbers() -> None:
    paths = [("order", 0, 1), ("order", 1, 0), ("order", 1), ("order", 0, 11), ("order", 0, 1, 1), ("epoch", 0, 1)]
    seeds = [stream(*path) for path in paths]
    assert len({seed % 2**31 for seed in seeds}) == len(paths)  # of which some generators take the lower half only
    assert seeds == [stream(*path) for path in paths]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_stream_seeds_python_numpy_and_torch() -> None:
    def drawn(*path: int) -> list[float]:
        begin_stream("epoch", *path)
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    first, again, other = drawn(0, 1), drawn(0, 1), drawn(0, 2)
    assert first == again
    assert not set(first) & set(other)


class Watched(Images):
    """Notes which images are visited, and what a transform would draw then."""

    visits: ClassVar[list[int]] = []
    draws: ClassVar[list[tuple[float, ...]]] = []

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        Watched.visits.append(index)
        Watched.draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def data() -> Data:
    whole = open_digits(size=8, margin=0)
    return replace(whole, train=Watched(whole.train.images[:24], whole.train.labels[:24]), name="24 digits")


def epochs(data: Data, seed: int, folder: Path) -> list[tuple[list[int], list[tuple[float, ...]]]]:
    """Order and draws of each of three epochs."""
    Watched.visits.clear()
    Watched.draws.clear()
    vit = small_vit(img_size=8, patch_size=4, depth=1, in_chans=1, num_classes=10)
    train(FullConfig().build(vit), data, Recipe(epochs=3, batch_size=8, seed=seed, evaluate_every=0), folder)
    each = range(0, len(Watched.visits), len(Watched.visits) // 3)
    return [(Watched.visits[i : i + each.step], Watched.draws[i : i + each.step]) for i in each]


@pytest.mark.parametrize("repeats", [0, 3])
def test_no_two_epochs_of_any_seeds_share_order_or_augmentation(repeats: int, data: Data, tmp_path: Path) -> None:
    runs = [epochs(replace(data, repeats=repeats), seed, tmp_path / str(seed)) for seed in range(3)]
    found = {(seed, epoch): runs[seed][epoch - 1] for seed, epoch in GRID}
    for one, other in combinations(GRID, 2):
        assert found[one][0] != found[other][0], f"{one} and {other} have one order"
        for places in zip(*found[one][1], strict=True), zip(*found[other][1], strict=True):
            assert all(len(set(draws)) == len(found[one][1]) for draws in places)
        assert not {draw for draws in found[one][1] for draw in draws} & {
            draw for draws in found[other][1] for draw in draws
        }, f"{one} and {other} are augmented alike"
    assert epochs(replace(data, repeats=repeats), 1, tmp_path / "again") == runs[1]


def test_processes_share_the_order_and_draw_their_own(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for rank in range(2):
        monkeypatch.setattr("adaptvit.training.loader.place", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(Accelerator, "process_index", rank)
        runs.append(epochs(data, 5, tmp_path / str(rank)))
    for (one, drawn), (other, drawn_there) in zip(*runs, strict=True):
        assert sorted({*one, *other}) == sorted(one + other)
        assert not {*drawn} & {*drawn_there}


def test_a_streamed_data_set_is_told_seed_and_epoch(data: Data, tmp_path: Path) -> None:
    class Streamed(torch.utils.data.IterableDataset):
        told: ClassVar[list[int]] = []

        def set_epoch(self, count: int) -> None:
            self.told.append(count)

        def __len__(self) -> int:
            return 24

        def __iter__(self):  # type: ignore[no-untyped-def]
            return (data.train[index] for index in range(24))

    for seed in range(2):
        epochs(replace(data, train=Streamed()), seed, tmp_path / str(seed))
    assert len(set(Streamed.told)) == 6
    assert all(0 <= count < 2**31 for count in Streamed.told)
