from pathlib import Path

import torch
import torch.distributed as dist
from models import images, small_vit
from pairs import start_two
from torch.nn.functional import cross_entropy

from adaptvit import AViTConfig
from adaptvit.methods.losses import over_processes


def gradient(batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    vit = small_vit(dtype=torch.float64).train()
    model = AViTConfig(gate_scale=4.0, gate_center=2.0, prior_weight=1.0).build(vit)
    output = model(batch, detailed=True)
    terms = model.terms(over_processes(output.means)) if dist.is_initialized() else output.terms
    (cross_entropy(output.logits, labels) + sum(terms.values())).backward()
    return vit.blocks[0].mlp.fc1.weight.grad


def on_one_of_two(rank: int, folder: str) -> None:
    """What a process of a distributed run computes on its half of the batch, averaged as DDP averages gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    vit = small_vit()
    batch, labels = images(vit, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    half = slice(2 * rank, 2 * rank + 2)
    mean = gradient(batch[half], labels[half])
    dist.all_reduce(mean)
    if rank == 0:
        torch.save(mean / 2, Path(folder) / "gradient.pt")


def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    start_two(on_one_of_two, tmp_path)
    alone = gradient(images(small_vit(), 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(torch.load(tmp_path / "gradient.pt"), alone, atol=1e-12, rtol=1e-9)
