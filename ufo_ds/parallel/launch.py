"""Joining a job, whoever started it, and leaving it."""

import fcntl
import logging
import os
import signal
import socket
import struct
import sys
import warnings

import torch
import torch.distributed as dist

from ufo_ds.errors import UserError


def name_accelerator() -> None:
    """Tell DeepSpeed, which transformers imports too, that there is no GPU, before it warns that it found none."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def adopt_environment() -> int:
    """Put what the launcher says (deepspeed, torchrun, accelerate, srun, or none) into torch's variables.

    Slurm sets SLURM_PROCID and SLURM_NTASKS in the script of a job too, which is one process whatever its tasks are;
    SLURM_STEP_NUM_TASKS only srun does, for the tasks that it starts.

    Returns:
        The number of ranks.
    """
    name_accelerator()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        alone = torch.cuda.device_count() == 1  # on its GPU, where each task sees its own (--gpus-per-task)
        os.environ |= {
            "RANK": os.environ["SLURM_PROCID"],
            "LOCAL_RANK": "0" if alone else os.environ["SLURM_LOCALID"],
            "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        }
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    return int(os.environ["WORLD_SIZE"])


def init_distributed() -> tuple[int, int]:
    """Join the job; rank and number of ranks."""
    import deepspeed  # takes seconds, and the environment alone is wanted earlier
    from deepspeed.accelerator import get_accelerator

    adopt_environment()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls
    # On CPUs DeepSpeed would compile collectives over shared memory: a minute at the first start, and a rank that
    # waits there for one that was killed waits for ever. gloo notices.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    _bring_up_loopback()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        deepspeed.init_distributed(verbose=False)
    return dist.get_rank(), dist.get_world_size()


def leave_on_sigterm() -> None:
    """From now on SIGTERM, with which launchers and Slurm end a job, ends this process as an exception does: a
    checkpoint that is being written is finished first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def finish_distributed() -> None:
    """Leave the job together: a rank that ends first would look like one that died."""
    dist.barrier()
    dist.destroy_process_group()


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone (gloo's and NCCL's words for it)."""
    words = ("Connection closed by peer", "Connection reset", "Broken pipe", "Connection refused", "remote process")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _import_muon() -> None:
    """What every engine of DeepSpeed imports, whatever its optimizer is. Its kernels are handed to torch.compile then,
    which takes two seconds to import its backend; with the compiler off they stay as they are."""
    off = "TORCHDYNAMO_DISABLE"
    given = os.environ.get(off)
    os.environ[off] = "1"
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401

    if given is None:
        del os.environ[off]
    else:
        os.environ[off] = given


def _bring_up_loopback() -> None:
    """gloo needs an address even for one process, and in a network namespace of its own there is none yet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("127.0.0.1", 9))  # looks for a route; a datagram socket sends nothing
        except OSError:
            interface_up = struct.pack("16sH14s", b"lo", 0x1, b"")  # struct ifreq, IFF_UP (netdevice(7))
            try:
                fcntl.ioctl(probe, 0x8914, interface_up)  # SIOCSIFFLAGS
            except OSError as error:
                raise UserError(f"no address 127.0.0.1 ({error.strerror}): bring up the interface lo") from None
