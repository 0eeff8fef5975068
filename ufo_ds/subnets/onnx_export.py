"""A torch module as an ONNX file, and sessions of ONNX Runtime that run one."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ufo_ds.errors import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20
PIXELS = "pixel_values"
WITHIN = 2**30  # bytes of weights that the file has room for: protobuf ends at 2 GiB


def check_installed(what: str) -> None:
    """
    Raises:
        UserError: a package that ``what`` needs is not here.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'ufo_ds[onnx]'")


def export(
    module: nn.Module, pixels_BCHW: Tensor, file: Path, outputs: Sequence[str], dynamic_batch: bool = True
) -> None:
    """Write what a module computes from pixels. Attention is exported as plain products and a softmax ("eager"), which
    gives a smaller and faster graph.

    Weights of more than :data:`WITHIN` bytes go into ``<file>.data`` beside it.

    Args:
        module: in evaluation mode, of fp32 pixels ``[B, 3, H, W]``.
        pixels_BCHW: an example; with ``dynamic_batch`` of two images or more, as one would be taken for a constant.
        outputs: names of what it returns, in order.
    """
    weights = sum(value.nbytes for value in module.state_dict().values())
    with _quiet(), _eager_attention(module), torch.no_grad():
        torch.onnx.export(
            module,
            (pixels_BCHW,),
            file,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            external_data=weights > WITHIN,
            dynamic_shapes=({0: "batch"},) if dynamic_batch else None,
            input_names=[PIXELS],
            output_names=list(outputs),
        )


def session(file: Path, device: str = "cpu", threads: int | None = None) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Args:
        threads: of the CPU; default: as many as torch uses.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or torch.get_num_threads(), 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(file, options, providers=[provider(device)])


def provider(device: str) -> str:
    return "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"


def check_provider(device: str) -> None:
    """
    Raises:
        UserError: the ONNX Runtime that is installed has nothing for the device.
    """
    import onnxruntime

    if provider(device) not in onnxruntime.get_available_providers():
        raise UserError(
            f"--device {device}: this onnxruntime has no {provider(device)}: use cpu, or install onnxruntime-gpu"
        )


@contextlib.contextmanager
def _eager_attention(module: nn.Module) -> Iterator[None]:
    models = [model for model in module.modules() if isinstance(model, PreTrainedModel)]
    before = [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter says of every model that torchvision is not there, and warns of its own code."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exporter.setLevel(logging.ERROR)
        try:
            yield
        finally:
            exporter.setLevel(level)
