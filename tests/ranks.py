"""Starts the ranks of a test: forked from one process that has imported what they need, which takes each of them 6 s.

Launchers are what ``distributed/test_training.py`` starts. Here the test itself holds the store in which the ranks
find each other, as torchrun does, so that no port can be taken by another test.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from ufo_ds.parallel.launch import init_distributed

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch._dynamo",  # what torch imports when an optimizer is made
        "deepspeed.runtime.zero.muon.muon_optimizer",  # and DeepSpeed then
        "ufo_ds.train",
        "ufo_ds.training.session",
        "ufo_ds.training.route_chart",
        "ufo_ds.evaluate",
        "tests.distributed.equality",
        "sklearn.linear_model",
    ]
)


class Ranks:
    """``main(*arguments)`` on ``count`` processes, one alone without a launcher's environment."""

    def __init__(self, count: int, main: Callable[..., int | None], *arguments: object):
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5)
        )
        self._directory = TemporaryDirectory()
        self.logs = [Path(self._directory.name) / f"{rank}.txt" for rank in range(count)]  # what they write
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.touch()
            environment = dict(os.environ)
            if count > 1:
                environment |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
                }  # fmt: skip
            self.processes.append(_SERVER.Process(target=_rank, args=(environment, log, main, arguments)))
        for process in self.processes:
            process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(0)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Until it holds, or the ranks are at an end."""
        deadline = time.monotonic() + seconds
        while not condition() and any(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.001)

    def send(self, number: signal.Signals, rank: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid or 0, number)

    def first_failure(self, seconds: float) -> int:
        """What the first rank that failed ended with (-9: killed by signal 9), or 0 once all are at an end."""
        running = list(self.processes)
        while running:
            ended = wait([process.sentinel for process in running], seconds)
            assert ended, f"no rank ended within {seconds} s: {self.output()}"
            failed = [process.exitcode for process in running if process.sentinel in ended and process.exitcode]
            running = [process for process in running if process.sentinel not in ended]
            if failed:
                for process in running:
                    process.join(2)  # it may have more to say
                return failed[0]
        return 0

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
        return "\n".join(log.read_text() for log in self.logs)


def launch(count: int, main: Callable[..., int | None], *arguments: object, timeout: float = 300) -> tuple[int, str]:
    """Run ``main(*arguments)`` on ``count`` processes, until all are at an end or one has failed.

    Returns:
        :meth:`Ranks.first_failure`, and what all of them wrote.
    """
    with Ranks(count, main, *arguments) as ranks:
        return ranks.first_failure(timeout), ranks.output()


def run(count: int, main: Callable[..., int | None], *arguments: object, timeout: float = 300) -> str:
    """As :func:`launch` where all must end well."""
    status, output = launch(count, main, *arguments, timeout=timeout)
    assert status == 0, output[-3000:]
    return output


def results(
    count: int,
    of_case: Callable[[Any], Any],
    cases: Sequence[Any],
    before: Callable[[], None] | None = None,
    timeout: float = 300,
) -> list[Any]:
    """What ``of_case(case)`` returns on the first of ``count`` ranks, for each case, in one job.

    Args:
        before: to be called on every rank before it joins the job.
    """
    with TemporaryDirectory() as directory:
        file = Path(directory) / "results.json"
        run(count, _go_through, of_case, cases, before, file, timeout=timeout)
        return json.loads(file.read_text())


def _go_through(
    of_case: Callable[[Any], Any], cases: Sequence[Any], before: Callable[[], None] | None, file: Path
) -> None:
    if before is not None:
        before()
    torch.set_num_threads(1)
    rank, _ = init_distributed()
    found = [of_case(case) for case in cases]
    if rank == 0:
        file.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _rank(environment: dict[str, str], output: Path, main: Callable[..., int | None], arguments: tuple) -> None:
    gc.freeze()  # the collector would go through all that was imported, and so copy its pages
    os.environ.clear()
    os.environ.update(environment)  # the test's, not that of the server's start
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)
    sys.exit(main(*arguments))
