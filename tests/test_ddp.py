"""Every method under DDP and `fully_shard` on two processes, beside one process that does the work of both."""

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import METHODS, ONE_OF_EACH, images, small_vit, vary
from pairs import start_two
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from adaptvit.model import AdaptiveViT

ACCUMULATE, SIZES = 2, (3, 2)
"""Of the second process batches are smaller."""
SHARDED = ("full", "avit", "adavit", "dynamicvit", "tome")
HALF = torch.bfloat16


def model_of(method: str, dtype: torch.dtype = torch.float64) -> AdaptiveViT:
    torch.manual_seed(0)
    return vary(METHODS[method].build(small_vit(dtype=dtype)).to(dtype)).train()


def batch_of(rank: int, step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images, of which the first one's channel 0, which A-ViT goes by, is so high that its tokens stop at once."""
    vit = small_vit(dtype=dtype)
    batch = images(vit, SIZES[rank], seed=10 * step + rank, dtype=dtype)
    batch[0] = 30 * vit.patch_embed.proj.weight[0].detach().sign().repeat(1, 4, 4)
    return batch, torch.arange(SIZES[rank]) + step


def loss_of(model: Any, rank: int, step: int) -> Tensor:
    """The method's terms come with the logits' gradient."""
    batch, labels = batch_of(rank, step)
    torch.manual_seed(10 * step + rank)  # of what is drawn in the forward pass
    return cross_entropy(model(batch), labels)


def stepped(model: AdaptiveViT, called: Any, ranks: tuple[int, ...]) -> dict[str, Tensor]:
    """Weights and their moving average after an update by several steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    average = ModelEmaV3(model, 0.5)
    model.terms_scale = 1 / (ACCUMULATE * len(ranks))
    for step in range(ACCUMULATE):
        last = step + 1 == ACCUMULATE
        for rank in ranks:
            with nullcontext() if last or called is model else called.no_sync():
                (loss_of(called, rank, step) / (ACCUMULATE * len(ranks))).backward()
    optimizer.step()
    average.update(model)
    means = {f"average of {name}": value for name, value in average.module.state_dict().items()}
    return {name: value.clone() for name, value in (model.state_dict() | means).items()}


def sharded(model: AdaptiveViT, mesh: Any, **options: Any) -> AdaptiveViT:
    for block in model.vit.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def on_one_of_two(rank: int, folder: str) -> None:
    """By case: what there is in the end, or what went wrong."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), world_size=2, rank=rank)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    full = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    for method in ONE_OF_EACH:
        try:
            model = model_of(method)
            found[method] = stepped(model, DistributedDataParallel(model, find_unused_parameters=False), (rank,))
        except Exception as error:
            found[method] = f"{type(error).__name__}: {error}"
    for method in SHARDED:
        model = sharded(model_of(method), mesh)
        loss_of(model, rank, 0).backward()
        torch.optim.SGD(model.parameters(), 0.05).step()
        file = Path(folder) / f"{method}.pt"
        saved = get_model_state_dict(model, options=full)  # of the first process alone
        if rank == 0:
            torch.save(saved, file)
        again = sharded(model_of(method), mesh)
        set_model_state_dict(again, torch.load(file) if rank == 0 else {}, options=full)
        torch.manual_seed(0)
        with torch.no_grad():
            logits = [one.eval()(batch_of(1, 5)[0]) for one in (model, again)]
        found["saved", method] = logits, str(file)
        half = sharded(model_of(method, torch.float32), mesh, mp_policy=MixedPrecisionPolicy(HALF, torch.float32))
        batch, labels = batch_of(rank, 0, torch.float32)
        logits = half(batch)
        cross_entropy(logits.float(), labels).backward()
        grads = [part.grad.full_tensor() for part in half.parameters() if part.grad is not None]
        kinds = {grad.dtype for grad in grads}
        with torch.no_grad():
            told = half.eval()(batch_of(1, 5, torch.float32)[0])
        found["half", method] = {
            "kinds": kinds,
            "finite": all(grad.isfinite().all() for grad in grads),
            "logits": told,
            "training": logits.dtype,
        }
    torch.save(found, Path(folder) / f"found-{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("two")
    start_two(on_one_of_two, folder)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


def test_the_first_image_of_a_batch_stops_at_once() -> None:
    model = model_of("avit").eval()
    depth = model(batch_of(0, 0)[0], detailed=True).usage.patch_depth.flatten(1)
    assert depth[0].max() == 1
    assert depth[1:].max() > 1


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_two_processes_under_ddp_step_as_one_that_sees_both_batches(method: str, two: list[dict[Any, Any]]) -> None:
    model = model_of(method)
    wanted = stepped(model, model, (0, 1))
    for found in two:
        assert isinstance(found[method], dict), found[method]
        torch.testing.assert_close(found[method], wanted, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("method", SHARDED)
def test_what_is_sharded_is_saved_whole_and_read_again(method: str, two: list[dict[Any, Any]]) -> None:
    (first, file), (other, _) = (found["saved", method] for found in two)
    plain = model_of(method)
    plain.load_state_dict(torch.load(file))  # of one process, without FSDP
    with torch.no_grad():
        wanted = plain.eval()(batch_of(1, 5)[0])
    assert not torch.equal(wanted, model_of(method).eval()(batch_of(1, 5)[0]))
    for logits in (*first, *other):
        torch.testing.assert_close(logits, wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("method", SHARDED)
def test_in_mixed_precision_a_sharded_model_computes_as_one_of_half_weights(
    method: str, two: list[dict[Any, Any]]
) -> None:
    model = model_of(method, torch.float32).to(HALF).eval()
    with torch.no_grad():
        wanted = model(batch_of(1, 5, torch.float32)[0].to(HALF))
    for found in two:
        told = found["half", method]
        assert (told["kinds"], told["training"]) == ({torch.float32}, HALF)
        assert told["finite"]
        torch.testing.assert_close(told["logits"], wanted)
