"""A model as a file that runs without this library: ONNX, a program of `torch.export`, or one compiled for a machine.

Letters: B images.
"""

import io
import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import ExportedProgram
from torch.fx import GraphModule

from adaptvit.backbones.base import input_size, model_name
from adaptvit.checks import In, OneOf, checked
from adaptvit.data import preparation
from adaptvit.extras import needed
from adaptvit.files import as_json, check_output, replacing
from adaptvit.macs import dense_macs, macs
from adaptvit.model import AdaptiveViT
from adaptvit.process import as_found, in_float64
from adaptvit.tokens import Dense, Masked, Slab, Tokens
from adaptvit.usage import check_finite, join

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2"}
"""What files end in, by their format."""
DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""Of weights and features; images and logits are float32 in every file."""
TOLERANCE = {"float32": 1e-3, "float16": 0.1}
"""By how much of the largest logit a file's logits may differ from the model's."""
TURNED = 0.2
"""Share of the images, at least one, of which rounding may turn a decision: a score so near its threshold, or to
another, that a runtime's last digit decides. Their logits are those of other tokens."""
ONNX_LIMIT = 2**31
"""Bytes of an ONNX file that is one file."""
METADATA = "adaptvit"
"""Where a file holds its facts as JSON: the key in ONNX's `metadata_props` and in the metadata of what is compiled; in
torch's `extra_files` it ends in .json."""

BATCH, MOST = 32, 4096
"""Images that are run at once for comparing, and that a file of any batch takes at most."""

Format = Literal["onnx", "torch", "aoti"]
Run = Callable[[Tensor], Sequence[Tensor]]
"""Images -> logits, and whether they overflow where the layout can."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it did against the model."""

    path: Path
    """The file."""
    size: int
    """Its bytes."""
    images: int
    """Images that both ran."""
    equal: int
    """Of them, those whose largest logit is that of the same class."""
    difference: float
    """The largest, of any two logits of an image of which no decision was turned."""
    turned: int
    """Images whose logits differ by more than that, since rounding turned a decision; none where nothing is decided."""
    overflowed: int
    """Images in batches for which the file told that its rows are too few; they are not among `images`."""
    facts: dict[str, Any]
    """What the file says of itself: `model`, `method` with its numbers, `share` of the dense MACs, `gmacs`, `layout`,
    `rows` where that is `Slab`, `dtype`, `batch`, `preparation` of images, `classes`, the version of `adaptvit`."""


class _Served(nn.Module):
    """Images -> logits, both float32, whatever the model is in; of `Slab`, and whether they overflow."""

    def __init__(self, model: AdaptiveViT, layout: type[Tokens], dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.layout, self.dtype = model, layout, dtype

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.layout is Slab:
            logits, over = self.model.by_plan(images.to(self.dtype))
            return logits.float(), over
        alone: Tensor = self.model(images.to(self.dtype), layout=self.layout)
        return alone.float()


@checked
@as_found()
def export(
    model: AdaptiveViT,
    path: Path | str,
    format: Format = "onnx",
    batch: Annotated[Literal["dynamic"] | int, In("[1, inf)")] = "dynamic",
    dtype: Annotated[str, OneOf(DTYPES)] = "float32",
    layout: type[Tokens] = Dense,
    images: Tensor | None = None,
    classes: Sequence[str] | None = None,
    tell: Callable[[str], object] | None = None,
) -> Exported:
    """Write a model, in evaluation mode, as a file that its runtime runs without this library.

    Before it is written the file is run, on the CPU, and its logits are compared with the model's in float32. The model
    stays as it is.

    Args:
        path: the file, which ends in .onnx or .pt2, as its format does.
        format: `onnx` for ONNX Runtime and others, `torch` for `torch.export.load`, `aoti` compiled for machines like
            this one, for `torch._inductor.aoti_load_package`.
        batch: images that the file takes at once: any number, or this one.
        dtype: float32 or float16, of weights and features; images and logits are float32.
        layout: `Dense`, of a method that keeps what each image needs for one image at a time; `Slab`, for so many as
            `batch` says, by `model.plan`, which gives `overflow` beside the logits: true where the plan has too few
            rows for these images, whose logits then are NaN; or `Masked`, which takes any and saves nothing.
        images: (B, channels, height, width), prepared, that both are run on; None is noise.
        classes: names that the file is to carry; None is those that the ViT itself has.
        tell: called with what is done next.
    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        MissingLibrary: a library of the extra `onnx` is not there.
        ValueError: what cannot be exported, before any work where that is known; logits that are not finite; or a file
            whose logits are others than the model's, which is not written.
    """
    path, tell = Path(path), tell or (lambda _: None)
    check_exportable(model, path, format, dtype, layout, classes, batch)
    if layout is Slab and model.plan is None:
        raise ValueError("layout=Slab goes by model.plan: set it to adaptvit.measure_plan(model, images)")
    name, size = model_name(model.vit), input_size(model.vit)
    prepared, count = preparation(model, name), 4 if batch == "dynamic" else int(batch)
    if images is None:
        images = torch.randn(count, *size, generator=torch.Generator().manual_seed(0))
    if batch != "dynamic" and len(images) % count:
        raise ValueError(f"images must be a multiple of the file's batch, {count}, got {len(images)}")
    batches = images.to("cpu", torch.float32).split(BATCH if batch == "dynamic" else count)
    tell(f"running {name}")
    own = deepcopy(model).to("cpu", torch.float32).eval()
    with torch.inference_mode():
        outputs = [own(some, layout=layout, detailed=True) for some in batches]
    logits, usage = torch.cat([one.logits for one in outputs]), join([one.usage for one in outputs])
    check_finite(logits, "logits")
    dense = dense_macs(own.shape, usage.grid)
    executed = dense if layout is Masked else in_float64(macs(usage, own.shape)).mean().item()
    facts = {
        "adaptvit": version("adaptvit"),
        "model": name,
        "method": model.config.to_dict(),
        "share": executed / dense,
        "gmacs": executed / 1e9,
        "layout": layout.__name__,
        "dtype": dtype,
        "batch": batch,
        **({"rows": list(own.plan.rows(count))} if layout is Slab and own.plan is not None else {}),
        "preparation": prepared,
        "classes": list(model.class_names if classes is None else classes),
    }
    tell("exporting it")
    try:
        program = _program(_Served(own.to(DTYPES[dtype]), layout, DTYPES[dtype]), size, batch)
        content, run = {"onnx": _onnx, "torch": _torch, "aoti": _aoti}[format](program, as_json(facts), batch)
    except Exception as error:  # torch's exporters raise a dozen kinds, on parts that nobody here has seen
        raise ValueError(f"{name} with {model.config.title} cannot be exported: {str(error).strip()[:300]}") from error
    tell("running the file")
    told = [run(some) for some in batches]
    fits = torch.cat([torch.full((len(one),), not any(over)) for one, *over in told])
    ran, logits = torch.cat([one for one, *_ in told])[fits], logits[fits]
    if not len(ran):
        raise ValueError(
            f"{str(path)!r} is not written: the plan has too few rows for any of these images; measure it on such"
        )
    apart, most = (ran - logits).abs().flatten(1).amax(dim=1), logits.abs().max().item()
    near = apart <= TOLERANCE[dtype] * most
    same = (ran.argmax(dim=1) == logits.argmax(dim=1)).view(len(ran), -1).all(dim=1)
    turned, equal = int((~near).sum()), int(same.sum())
    allowed = max(1, int(TURNED * len(ran))) if executed < dense and len(ran) > 1 else 0
    if turned > allowed or not ran.isfinite().all() or (dtype == "float32" and not same[near].all()):
        raise ValueError(
            f"{str(path)!r} is not written: of {len(logits)} images it predicts {len(logits) - equal} otherwise than "
            f"the model, and logits differ by up to {apart.max().item():.2g}"
        )
    difference = apart[near].max().item()
    with replacing(path) as partial:
        partial.write_bytes(content)
    over = len(fits) - len(logits)
    return Exported(path, len(content), len(logits), equal, difference, turned, over, json.loads(as_json(facts)))


def check_format(
    path: Path, format: Format, layout: type[Tokens] = Dense, batch: Literal["dynamic"] | int = "dynamic"
) -> None:
    """Refuse a file that cannot be written, whatever the model.

    Raises:
        ValueError, FileNotFoundError, MissingLibrary: as `export` does.
    """
    if layout is Slab and batch == "dynamic":
        raise ValueError("layout slab has as many rows as a batch of so many images needs: choose its batch, such as 8")
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"a file of format {format!r} ends in {SUFFIXES[format]}, got {path.name!r}")
    if format == "onnx":
        with needed("exporting to ONNX"):
            import onnx as onnx
            import onnxruntime as onnxruntime
            import onnxscript as onnxscript
    if format == "aoti":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(f"format aoti takes a C++ compiler, and none is here: {str(error)[:200]}") from error
    check_output(path)


def check_exportable(
    model: AdaptiveViT,
    path: Path,
    format: Format = "onnx",
    dtype: str = "float32",
    layout: type[Tokens] = Dense,
    classes: Sequence[str] | None = None,
    batch: Literal["dynamic"] | int = "dynamic",
) -> None:
    """Refuse, before any work, what `export` is known not to do of these.

    Raises:
        ValueError, TypeError, FileNotFoundError, MissingLibrary: as `export` does.
    """
    if not isinstance(model, AdaptiveViT):
        raise TypeError(f"export takes an adaptive model, got a {type(model).__name__}: FullConfig().build(vit) is one")
    if layout not in (Dense, Slab, Masked):
        raise ValueError(f"layout of a file must be adaptvit.Dense, adaptvit.Slab or adaptvit.Masked, got {layout!r}")
    check_format(path, format, layout, batch)
    training = model.training
    try:
        even = model.train(False).even
    finally:
        model.train(training)
    if layout is Dense and not even and (batch != 1 or not model.drops):
        alone = "batch 1, one image at a time; " if model.drops else ""
        raise ValueError(
            f"{model.config.title} as it is set keeps what each image needs, and a file has as many tokens of every "
            f"image: choose {alone}layout slab with a batch, by a plan; or layout masked, which computes all"
        )
    if format == "aoti" and layout is Dense and not even:
        raise ValueError("format aoti has no shapes that depend on the image: choose onnx or torch, or layout slab")
    check_names(classes, model.num_classes)
    weigh = sum(tensor.numel() for tensor in model.state_dict().values()) * DTYPES[dtype].itemsize
    if format == "onnx" and weigh >= ONNX_LIMIT:
        raise ValueError(f"the weights are {weigh / 1e9:.1f} GB, and one ONNX file holds 2: choose float16, or torch")


def check_names(classes: Sequence[str] | None, count: int | None) -> None:
    """Refuse names of more or fewer classes than a model has, as far as both are known."""
    if classes is not None and count is not None and len(classes) != count:
        raise ValueError(f"the model has {count} classes, but there are {len(classes)} names of them")


def _program(served: _Served, size: tuple[int, int, int], batch: Literal["dynamic"] | int) -> ExportedProgram:
    """What images of a batch go through, as one graph."""
    dynamic = batch == "dynamic"
    images = torch.zeros(2 if dynamic else int(batch), *size)
    shapes = ({0: torch.export.Dim("batch", min=1, max=MOST)},) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(served.eval(), (images,), dynamic_shapes=shapes, strict=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # which names folders of this machine
    return program


def _onnx(program: ExportedProgram, facts: str, batch: Literal["dynamic"] | int) -> tuple[bytes, Run]:
    """The file, and how ONNX Runtime runs it."""
    from onnxruntime import InferenceSession, SessionOptions

    shapes = ({0: "batch"},) if batch == "dynamic" else None
    written = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits", "overflow"][: len(program.graph_signature.user_outputs)],
        dynamic_shapes=shapes,
        custom_translation_table=_translations(),
    )
    assert written is not None
    model = written.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where it came from, line by line
    model.metadata_props.add(key=METADATA, value=facts)
    content, options = model.SerializeToString(), SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return content, lambda images: [torch.as_tensor(one) for one in session.run(None, {"images": images.numpy()})]


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators that the exporter does not know, or writes with more steps, and of shapes that have no zero."""
    from onnxscript import opset20

    op: Any = opset20  # whose types are those of the numbers in a graph

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if is_causal or enable_gqa:
            raise NotImplementedError("attention with an order or with groups of queries")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = op.MatMul(op.Mul(query, op.CastLike(scale, query)), op.Transpose(key, perm=[0, 1, 3, 2]))
        if attn_mask is not None:
            hidden = attn_mask.dtype.name == "BOOL"
            mask = op.Where(attn_mask, op.CastLike(0.0, query), op.CastLike(-math.inf, query)) if hidden else attn_mask
            logits = op.Add(logits, mask)
        return op.MatMul(op.Softmax(logits, axis=-1), value)

    def nonzero_static(chosen: Any, size: int, fill_value: int = -1) -> Any:
        rows = op.Transpose(op.NonZero(chosen), perm=[1, 0])
        rest = op.Expand(op.Constant(value_ints=[fill_value]), op.Constant(value_ints=[size, len(chosen.shape)]))
        every = op.Concat(rows, rest, axis=0)
        return op.Slice(every, op.Constant(value_ints=[0]), op.Constant(value_ints=[size]))

    aten = torch.ops.aten
    return {aten.scaled_dot_product_attention.default: attention, aten.nonzero_static.default: nonzero_static}


def _torch(program: ExportedProgram, facts: str, _: Any) -> tuple[bytes, Run]:
    """The file, and how torch runs it."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={f"{METADATA}.json": facts})
    file.seek(0)
    return file.getvalue(), _without_gradients(torch.export.load(file).module())


def _aoti(program: ExportedProgram, facts: str, _: Any) -> tuple[bytes, Run]:
    """The file, and how torch runs it."""
    configs: Any = {"aot_inductor.metadata": {METADATA: facts}}
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=configs)
        return Path(path).read_bytes(), _without_gradients(torch._inductor.aoti_load_package(path))


def _without_gradients(loaded: Callable[[Tensor], Any]) -> Run:
    def run(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            out = loaded(images)
        return [out] if isinstance(out, Tensor) else out

    return run
