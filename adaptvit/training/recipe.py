"""How to train, and what is told of each epoch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from timm.optim import list_optimizers

from adaptvit.checks import In, check_fields, quoted


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train."""

    epochs: Annotated[int, In("[1, inf)")]
    """Passes over the training split."""
    batch_size: Annotated[int, In("[1, inf)")] = 64
    """Images per step and process; the images left over at the end of an epoch are skipped."""
    accumulate: Annotated[int, In("[1, inf)")] = 1
    """Steps whose gradients are averaged into one update."""
    optimizer: str = "adamw"
    """A name of `timm.optim.list_optimizers()`."""
    learning_rate: Annotated[float, In("(0, inf)")] = 1e-3
    """Peak of the learning rate, after the warm-up; from there it falls along a cosine."""
    method_learning_rate: Annotated[float, In("(0, inf)")] = 1.0
    """Of the method's own parameters, over that of the ViT's."""
    head_learning_rate: Annotated[float, In("(0, inf)")] = 1.0
    """Of the classifier's parameters, over that of the ViT's other ones."""
    warmup_learning_rate: Annotated[float, In("[0, inf)")] = 0.0
    """Where the warm-up begins."""
    least_learning_rate: Annotated[float | None, In("[0, inf)")] = None
    """Where the cosine ends; None is a hundredth of the peak."""
    weight_decay: Annotated[float, In("[0, inf)")] = 0.05
    """Weight decay of matrices; biases and norms have none."""
    warmup_epochs: Annotated[int, In("[0, inf)")] = 1
    """Epochs of linear warm-up, below `epochs`."""
    label_smoothing: Annotated[float, In("[0, 1)")] = 0.1
    """Share of the target spread over all classes, in [0, 1)."""
    mixup: Annotated[float, In("[0, 1000]")] = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: Annotated[float, In("[0, 1000]")] = 0.0
    """Alpha of cutmix; 0 is off. With both, each batch takes one of them at random."""
    clip_grad: Annotated[float | None, In("(0, inf)")] = 1.0
    """Largest norm of the gradient of an update; None does not clip."""
    ema_decay: Annotated[float | None, In("(0, 1)")] = None
    """Decay of the averaged weights, in (0, 1). They are what is evaluated, and what a finished run leaves in the
    model; None averages nothing."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward pass; weights, gradients and halting stay float32."""
    compile: bool = False
    """Train through `torch.compile`; what is evaluated and saved is the model as it is. Each new value of the knob that
    training steers to is compiled anew, once: set `steer_every` accordingly."""
    distillation: Literal["soft", "hard"] = "soft"
    """What a teacher teaches: its distribution, or its first choice."""
    distillation_weight: Annotated[float, In("[0, 1]")] = 0.5
    """Share of the teacher in the task's loss, in [0, 1]."""
    temperature: Annotated[float, In("[0.001, 1e6]")] = 1.0
    """Of soft distillation."""
    freeze: tuple[str, ...] = ()
    """Parameters of the ViT to leave as they are, by patterns of their names: patch_embed.*, blocks.0.*, pos_embed."""
    final_gate_temperature: Annotated[float | None, In("[0.001, 1e6]")] = None
    """Temperature of the method's gates at the end; it falls to that by equal factors. None keeps the method's."""
    target: Annotated[float | None, In("(0, 1]", "the share of the dense MACs")] = None
    """Share of the dense MACs in (0, 1] that the method's knob is steered to while training; None leaves the knob."""
    ease_epochs: Annotated[float, In("[0, inf)")] = 0.0
    """Epochs over which the target comes down from 1, so that pretrained features are not wrecked at the first step."""
    steer_every: Annotated[int, In("[1, inf)")] = 40
    """Updates between two settings of the knob, each on the images at hand."""
    evaluate_every: Annotated[int, In("[0, inf)")] = 1
    """Epochs between two evaluations of the test split, the last epoch's always included; 0 never evaluates."""
    checkpoint_every: Annotated[int | None, In("[1, inf)")] = None
    """Updates between two checkpoints within an epoch, for epochs that take hours; None writes one after each alone."""
    tensorboard: bool = False
    """Also log to TensorBoard, in the run's folder."""
    seed: Annotated[int, In("[0, 4294967295]")] = 0
    """Decides the starting weights, and with the number of the epoch the order of the images and all that is drawn in
    training; seeds, epochs and processes share nothing of it."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.optimizer.lower().removeprefix("lookahead_") not in list_optimizers():
            raise ValueError(
                f"Recipe.optimizer must be a name of timm.optim.list_optimizers(), got {quoted(self.optimizer)}"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"Recipe.warmup_epochs must lie in [0, epochs={self.epochs}), got {self.warmup_epochs}")
        if self.compile and self.final_gate_temperature is not None:
            raise ValueError(
                "Recipe.compile would compile every update anew, as Recipe.final_gate_temperature has gates that cool: "
                "one of them"
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"Recipe.batch_size must be even for mixup and cutmix, got {self.batch_size}")


@dataclass(frozen=True)
class Epoch:
    """One epoch, averaged over its training images: a line of the log."""

    epoch: int
    """Counted from 1."""
    loss: float
    """Loss of the task."""
    terms: dict[str, float]
    """The method's own loss terms, weighted."""
    accuracy: float
    """Share of training images classified correctly while training."""
    macs: float
    """Executed MACs over those of the timm model, forward pass."""
    depth_mean: float | None
    """Mean blocks entered by a patch token; None, like the next two, where the method does not track them."""
    depth_min: int | None
    """Of any patch."""
    depth_max: int | None
    """Of any patch."""
    learning_rate: float
    """Of the last update."""
    knob: float | None
    """The method's knob at the end; None where it has none."""
    unreadable: int
    """Training images that could not be decoded; another of the batch took the place of each."""
    test: dict[str, float | int | None] | None
    """What `evaluate` says of the test split after this epoch; None where it was not asked."""
    seconds: float
    """Duration."""
