"""Ranks forked from a process in which everything is imported: without a launcher, and started within a second."""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - imported once, for all ranks
import torch

from tests.distributed import equality  # noqa: F401 - the same
from ufo_ds import train
from ufo_ds.errors import run
from ufo_ds.training import session  # noqa: F401 - the same

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.forked"])
REPOSITORY = Path(__file__).parents[2]


def _rank(rank: int, count: int, port: int, log: Path, act: Callable[..., Any], arguments: tuple) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(act(*arguments))


def train_slowly(arguments: list[str], file_size: dict[int, int]) -> int:
    """A training whose disk takes its time; ``file_size``: by rank, the bytes after which it is full."""
    fsync, draw = os.fsync, random.Random(os.environ["RANK"])

    def slow(descriptor: int) -> None:
        time.sleep(draw.uniform(0.0, 0.1))
        fsync(descriptor)

    os.fsync = slow
    if (limit := file_size.get(int(os.environ["RANK"]))) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return run(train.main, arguments)


class Ranks:
    """Processes that run ``act(*arguments)``; ``log``: what they print, one file a rank."""

    def __init__(self, count: int, logs: Path, act: Callable[..., Any], *arguments: Any):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{time.time_ns()}-{rank}.log" for rank in range(count)]
        self.processes: list[BaseProcess] = [
            CONTEXT.Process(target=_rank, args=(rank, count, port, self.logs[rank], act, arguments))
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 240.0) -> None:
        """Until it holds, or the ranks are at an end."""
        deadline = time.monotonic() + seconds
        while not condition() and any(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.001)

    def send(self, number: signal.Signals, rank: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid or 0, number)

    def end(self, seconds: float) -> list[int | None]:
        """Their exit status, None of those that are not at an end by then (they are killed)."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        found = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return found

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())


def training(count: int, recipe: Path, run_dir: Path, *more: str, file_size: dict[int, int] | None = None) -> Ranks:
    """Ranks of a training; EP 2 where there are two."""
    arguments = ["--recipe", str(recipe), "--run_dir", str(run_dir), *more]
    config = REPOSITORY / "ds_configs" / "moe.json"
    if count > 1:
        config = run_dir.with_name("moe.json")
        config.write_text('{"expert_parallel": {"autoep_size": 2}}')
    arguments += ["--deepspeed", str(config)]
    return Ranks(count, run_dir.with_name(f"{run_dir.name}-logs"), train_slowly, arguments, file_size or {})
