"""Ranks on this machine without a launcher, forked from a process that has imported everything: they start at once."""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessContext, start_processes

from ufo_ds.parallel.launch import finish_distributed, init_distributed


def start_ranks(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> ProcessContext:
    """Run a function of a module in ``count`` ranks of a job, with a thread each.

    The process that they are forked from is started at the first call, in the environment as it is then.

    Returns:
        What is to be joined: an exception of a rank is raised there, as text, and the other ranks are ended.
    """
    # Beside the function's own module what torch's optimizers import when they are first used: seconds, in each rank.
    multiprocessing.set_forkserver_preload([function.__module__, "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = start_processes(_rank, (count, port, function, arguments), count, join=False, start_method="forkserver")
    assert context is not None
    return context


def _rank(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    init_distributed()
    gc.freeze()  # ZeRO-3 collects garbage whenever it is set up; what was imported is none
    function(*arguments)
    finish_distributed()
