"""A model as every engine calls it, in any process: encoded pictures -> classes, what each cost, an embedding.

    predictor = Predictor("fast.safetensors", budget=0.6)    # pickles as its settings: a process opens its own model
    columns = predictor([Path(name).read_bytes() for name in names])

`prepare` decodes one picture and needs no weights; `predict` takes what is decoded. Engines run them in two places.

Letters: B images, L blocks, D channels of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Annotated, Any, Literal

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor, nn

from adaptvit.backbones.base import patch_grid
from adaptvit.checks import In, check_fields
from adaptvit.data import preparation, read_image
from adaptvit.data.images import NOT_FINITE
from adaptvit.macs import dense_macs, macs
from adaptvit.model import AdaptiveViT
from adaptvit.process import best_device, fault, in_float64
from adaptvit.weights.opening import open_model

KNOWN_BY = 0.3
"""Correlation from which on what an image looks like is taken to tell what it costs."""
LIMITS = 0.5, 2.0
"""Of costs that are expected, over the mean: no batch has more than twice the usual number of images."""


@dataclass(frozen=True)
class Predictor:
    """A model file and how it is run; the model is opened to check them, and again in each process that predicts."""

    model: str
    """A file, folder, repository (`hf-hub:OWNER/NAME`) or timm name of a ViT, to be found by every process."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and features."""
    compile: bool = False
    """Run it under `torch.compile`."""
    budget: Annotated[float, In("(0, 1]", "the share of the dense MACs", "60 % is 0.6")] | None = None
    """Share of the dense MACs that images are to cost, by the dial in the file; None leaves the knob as it is."""
    embedding: bool = False
    """Tell of each image what the classifier reads, too."""
    batch_size: Annotated[int, In("[1, inf)")] = 32
    """Images in a forward pass; where costs are known, as many as cost what so many usual ones do."""
    device: Literal["cpu", "cuda", "mps", "xpu"] | None = None
    """Where to run; None takes an accelerator where the process has one, else the CPU."""
    costs: tuple[float, float] | None = None
    """What images cost, over the mean, by how much `detail` they have, as `expected_costs` found it: intercept and
    slope. None runs them in the order in which they come."""
    top: Annotated[int, In("[1, inf)")] | None = None
    """Classes told of each image in `top`, the most probable first; None tells the best alone."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.compile and self.embedding:
            raise ValueError(
                "Predictor.compile makes one graph of the model, of which no embedding is taken: choose one"
            )
        if "frames" in self.settings:  # which every process is to have without the weights, too
            raise ValueError(
                f"{self.model!r} takes clips, and a Predictor, with which adaptvit serve and predict --engine work, "
                "takes pictures: adaptvit predict without --engine takes clips"
            )
        self.classes  # noqa: B018

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("opened", "placed")}

    @cached_property
    def opened(self) -> AdaptiveViT:
        """The model, in evaluation mode, at its budget."""
        model = open_model(self.model)
        if self.budget is not None:
            model.compute = self.budget
        return model

    @cached_property
    def settings(self) -> dict[str, Any]:
        """How images are prepared, as `timm.data.create_transform` takes it."""
        return preparation(self.opened, self.model)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty where they have none, and are told by number."""
        return self.opened.class_names

    @cached_property
    def placed(self) -> nn.Module:
        """The model where it runs."""
        self.opened.to(self.device or best_device(), getattr(torch, self.dtype))
        return torch.compile(self.opened) if self.compile else self.opened  # type: ignore[return-value]

    @cached_property
    def _transform(self) -> Any:
        return create_transform(**self.settings, normalize=False)

    def prepare(self, content: bytes) -> np.ndarray:
        """A picture, decoded, scaled and cropped: (channels, height, width) uint8.

        Raises:
            Exception: of several kinds, where it cannot be decoded.
        """
        image = read_image(BytesIO(content), self.settings["input_size"][0])
        return np.ascontiguousarray(self._transform(image).numpy())

    def __call__(self, contents: Sequence[bytes]) -> dict[str, list[Any]]:
        """Encoded pictures -> the columns of `predict`, a row for each picture, with None where it has an `error`."""
        pixels: list[np.ndarray] = []
        errors: list[str | None] = []
        for content in contents:
            try:
                pixels.append(self.prepare(content))
                errors.append(None)
            except Exception as error:  # Pillow raises half a dozen kinds
                errors.append(str(error) or fault(error))
        rows = self.predict(np.stack(pixels)) if pixels else self.nothing
        places = np.cumsum([error is None for error in errors]) - 1
        told = {
            name: [None if error is not None else column[place] for place, error in zip(places, errors, strict=True)]
            for name, column in rows.items()
        }
        return told | {"error": [told["error"][row] if error is None else error for row, error in enumerate(errors)]}

    @property
    def nothing(self) -> dict[str, list[Any]]:
        """The columns without a row."""
        names = ["class", "probability", "macs", "tokens"]
        names += [name for name, asked in (("embedding", self.embedding), ("top", self.top)) if asked]
        return {name: [] for name in [*names, "error"]}

    def predict(self, pixels: np.ndarray) -> dict[str, list[Any]]:
        """What the model says of each image, in the order of the images.

        Args:
            pixels: (B, channels, height, width) uint8, as `prepare` makes them.
        Returns:
            `class`, its name or number; `probability`; `macs`; `tokens`, (L) that each block attended to; where they
            are asked for `embedding`, (D), and `top`, pairs of a class and its probability; `error`, why there is no
            answer, else None. Numbers are numpy's.
        """
        told: dict[str, list[Any]] = {name: [None] * len(pixels) for name in self.nothing}
        for batch in self.batches(pixels):
            for name, values in self._batch(pixels[batch]).items():
                for place, value in zip(batch, values, strict=True):
                    told[name][place] = value
        return told

    def batches(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Which images run together: those of like cost, a batch costing what `batch_size` usual ones do."""
        if self.costs is None:
            return np.split(np.arange(len(pixels)), range(self.batch_size, len(pixels), self.batch_size))
        intercept, slope = self.costs
        return of_like_cost(np.clip(intercept + slope * detail(pixels), *LIMITS), self.batch_size)

    def _batch(self, pixels: np.ndarray) -> dict[str, Sequence[Any] | np.ndarray]:
        run, model = self.placed, self.opened
        parameter = next(model.parameters())
        images = torch.from_numpy(pixels).to(parameter.device)
        read: list[Tensor] = []
        hook = None
        if self.embedding:
            hook = model.get_classifier().register_forward_pre_hook(lambda _, given: read.append(given[0]))
        try:
            with torch.inference_mode():
                output = run(self._normalised(images).to(parameter.dtype), detailed=True)
                logits = output.logits.float()
                found = logits.softmax(dim=1).topk(min(self.top or 1, logits.shape[1]))
                cost = in_float64(macs(output.usage, model.shape)).long()
        finally:
            if hook is not None:
                hook.remove()
        sound = logits.isfinite().all(dim=1).tolist()
        probabilities, best = found.values.cpu().numpy(), found.indices.cpu().numpy()
        named = [[self.classes[index] for index in row] for row in best] if self.classes else best
        columns: dict[str, Sequence[Any] | np.ndarray] = {
            "class": [row[0] for row in named],
            "probability": probabilities[:, 0],
            "macs": cost.cpu().numpy(),
            "tokens": output.usage.attended.cpu().numpy().astype(np.int32),
            "error": [None if finite else NOT_FINITE for finite in sound],
        }
        if self.embedding:
            columns["embedding"] = read[0].float().cpu().numpy()
        if self.top:
            columns["top"] = [
                [*zip(row, likely, strict=True)] for row, likely in zip(named, probabilities, strict=True)
            ]
        return columns

    def _normalised(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) uint8 -> as torchvision's `ToTensor` and `Normalize` have it, to the bit."""
        mean, std = (torch.tensor(self.settings[name], device=images.device).view(-1, 1, 1) for name in ("mean", "std"))
        return images.float().div_(255).sub_(mean).div_(std)

    @cached_property
    def dense_macs(self) -> int:
        """Of an image in the ViT without this library."""
        return dense_macs(self.opened.shape, patch_grid(self.opened.vit))


def detail(pixels: np.ndarray) -> np.ndarray:
    """How much there is to see in each image, the logarithm of how far neighbouring pixels lie apart: (B,).

    Args:
        pixels: (B, channels, height, width) uint8.
    """
    grey = pixels[:, pixels.shape[1] // 2].astype(np.int16)
    apart = [np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    return np.log(1 + sum(apart))


def expected_costs(pixels: np.ndarray, costs: np.ndarray) -> tuple[float, float] | None:
    """`Predictor.costs`, from images and their MACs; None where their detail tells little of them.

    Args:
        pixels: (B, channels, height, width) uint8.
        costs: (B,).
    """
    seen, costs = detail(pixels), costs / costs.mean()
    if len(seen) < 3 or not seen.std() or not costs.std() or abs(np.corrcoef(seen, costs)[0, 1]) < KNOWN_BY:
        return None
    slope, intercept = np.polyfit(seen, costs, 1)
    return float(intercept), float(slope)


def of_like_cost(costs: np.ndarray, size: float) -> list[np.ndarray]:
    """Places of images, the cheapest first, in batches that cost `size` and an image at most: of (B,) over the mean."""
    order = np.argsort(costs, kind="stable")
    before = np.cumsum(costs[order]) - costs[order]
    return [batch for batch in np.split(order, np.flatnonzero(np.diff(before // size)) + 1) if len(batch)]
