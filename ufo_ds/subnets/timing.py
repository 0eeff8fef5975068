"""How long calls of models take, on machines that others use too.

All models are called in turn, in short visits and many rounds, so that whatever slows the machine for a while slows all
of them alike; then a round's slowness is taken out of its times (median polish: Tukey, 1977, chapter 10).

On one thread of a CPU the clock is the thread's own: what other processes take of its core does not count. Elsewhere it
is the time that passes.
"""

import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ufo_ds.errors import UserError
from ufo_ds.progress import Progress
from ufo_ds.recipe_task import Size
from ufo_ds.seeding import numpy_generator
from ufo_ds.subnets import onnx_export
from ufo_ds.subnets.latency import Target

Call = Callable[[], object]
CALLS = 3  # timed in one visit; the one before them brings weights and code into the caches
SECONDS = 30.0  # of timed calls of all models together, if the numbers of rounds allow
ROUNDS = (12, 100)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check(target: Target) -> None:
    """
    Raises:
        UserError: this machine lacks what the target needs.
    """
    if target.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here: use cpu, or a machine with one")
    if target.backend == "onnx":
        onnx_export.check_installed("--backend onnx")
        if target.dtype != "fp32":
            raise UserError(f"--dtype {target.dtype} with --backend onnx is not supported: use fp32")
        onnx_export.check_provider(target.device)
    if target.backend == "compile" and target.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--backend compile needs a C++ compiler: install g++, or set CXX")


class _Output(nn.Module):
    """The one tensor that a model is asked for: logits, or else the embedding."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        outputs = self.model(pixel_values=pixels_BCHW)
        return outputs.logits if "logits" in outputs else outputs.pooler_output


def with_random_weights(models: Sequence[nn.Module], target: Target) -> None:
    """Give models on the meta device the same memory for their weights, which then is that of the largest."""
    sizes = [sum(_padded(value.numel()) for value in model.state_dict().values()) for model in models]
    generator = torch.Generator().manual_seed(0)
    memory = 0.02 * torch.randn(max(sizes), generator=generator)
    if target.backend != "onnx":
        memory = memory.to(target.device, _DTYPES[target.dtype])
    for model in models:
        state, start = {}, 0
        for name, value in model.state_dict().items():
            state[name] = memory[start : start + value.numel()].view(value.shape)
            start += _padded(value.numel())
        model.load_state_dict(state, assign=True)


def prepare(models: Sequence[nn.Module], input_hw: Size, target: Target) -> list[Call]:
    """Of each model a call with images that are on the device, ``[batch_size, 3, H, W]``; each was made once."""
    pixels_BCHW = torch.randn(target.batch_size, 3, *input_hw, generator=torch.Generator().manual_seed(0))
    prepare_one = _prepare_onnx if target.backend == "onnx" else call_of_module
    calls = []
    # By default torch keeps eight compilations of the same code.
    many = torch._dynamo.config.patch(recompile_limit=len(models) + 1) if target.backend == "compile" else nullcontext()
    with _threads(target.threads), many, Progress(len(models), unit="models", name="prepared") as progress:
        for model in models:
            calls.append(prepare_one(_Output(model).eval(), pixels_BCHW, target))
            calls[-1]()
            progress.update()
    return calls


def measure(calls: Sequence[Call], target: Target, rounds: int | None = None) -> np.ndarray:
    """Seconds of ``CALLS`` calls of each of N models in each of R rounds, ``[R, N, CALLS]``.

    Without ``rounds`` there are as many as take :data:`SECONDS`, within :data:`ROUNDS`.
    """
    times = []
    with _threads(target.threads):
        first = sum(_timed(call, target) for call in calls)
        rounds = rounds or int(np.clip(SECONDS / (first * (CALLS + 1)), *ROUNDS))
        with Progress(rounds, unit="rounds", name=f"{len(calls)} models") as progress:
            for i in range(rounds):
                times_NC = np.empty((len(calls), CALLS))
                for n in numpy_generator("latency", i).permutation(len(calls)):
                    calls[n]()
                    times_NC[n] = [_timed(calls[n], target) for _ in range(CALLS)]
                times.append(times_NC)
                progress.update()
    return np.stack(times)


def typical(times_RNC: np.ndarray) -> np.ndarray:
    """Seconds of one call of each of N models in a round as slow as the median one, ``[N]``.

    Of a visit the fastest call counts, as whatever comes between makes calls slower, never faster.
    """
    logarithm_RN = np.log(times_RNC.min(2))
    model_N = np.median(logarithm_RN, 0)
    round_R1 = np.zeros((len(logarithm_RN), 1))
    for _ in range(10):
        round_R1 = np.median(logarithm_RN - model_N, axis=1, keepdims=True)
        model_N = np.median(logarithm_RN - round_R1, axis=0)
    return np.exp(model_N + np.median(round_R1))


def milliseconds(calls: Sequence[Call], target: Target, rounds: int) -> list[float]:
    """Typical ones of each, called in turn."""
    return (1e3 * typical(measure(calls, target, rounds))).tolist()


def machine(target: Target) -> dict[str, str]:
    """Names of this machine and of what computes."""
    if target.device == "cuda":
        return {"name": platform.node(), "gpu": torch.cuda.get_device_name()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {"name": platform.node(), "cpu": cpu}


def versions(target: Target) -> dict[str, str]:
    """Of the libraries that run a model there."""
    names = ["torch", "transformers", *(("onnxruntime",) if target.backend == "onnx" else ())]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def call_of_module(module: nn.Module, pixels_BCHW: Tensor, target: Target) -> Call:
    """A call of torch with images that are on the device."""
    module = module.to(target.device, _DTYPES[target.dtype])
    pixels_BCHW = pixels_BCHW.to(target.device, _DTYPES[target.dtype])
    # Whole or not at all: what falls back to the interpreter would be measured as something else than it says.
    run = torch.compile(module, fullgraph=True, dynamic=False) if target.backend == "compile" else module

    def call() -> Tensor:
        with torch.inference_mode():
            return run(pixels_BCHW)

    return call


def _prepare_onnx(module: nn.Module, pixels_BCHW: Tensor, target: Target) -> Call:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.onnx"
        onnx_export.export(module, pixels_BCHW, file, ["output"], dynamic_batch=False)
        session = onnx_export.session(file, target.device, target.threads)
    return call_of_session(session, pixels_BCHW, target)


def call_of_session(session: Any, pixels_BCHW: Tensor, target: Target) -> Call:
    """A call of ONNX Runtime with images that are on the device."""
    import onnxruntime

    images = onnxruntime.OrtValue.ortvalue_from_numpy(pixels_BCHW.numpy(), target.device, 0)
    inputs = {onnx_export.PIXELS: images}
    return lambda: session.run_with_ort_values(None, inputs)


def _timed(call: Call, target: Target) -> float:
    if target.device == "cpu":
        clock = time.thread_time if target.threads == 1 else time.perf_counter
        began = clock()
        call()
        return clock() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _padded(count: int) -> int:
    """So that every tensor begins at a multiple of 64 bytes, as allocated ones do."""
    return -(-count // 32) * 32


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
