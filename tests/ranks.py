"""Starts the ranks of a test: forked from one process that has imported what they need, which takes each of them 6 s.

Launchers are what ``distributed/test_training.py`` starts. Here the test itself holds the store in which the ranks
find each other, as torchrun does, so that no port can be taken by another test.
"""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

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


def launch(ranks: int, main: Callable[..., int | None], *arguments: object, timeout: float = 300) -> tuple[int, str]:
    """Run ``main(*arguments)`` on ``ranks`` processes, one alone without a launcher's environment.

    Returns:
        What the first rank that failed ended with (-9: killed by signal 9), or 0; what all of them wrote.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    with TemporaryDirectory() as directory:
        output = Path(directory) / "output.txt"
        output.touch()
        processes = []
        for rank in range(ranks):
            of_launcher = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
            } if ranks > 1 else {}  # fmt: skip
            environment = {**os.environ, **of_launcher}
            processes.append(_SERVER.Process(target=_rank, args=(environment, output, main, arguments)))
        try:
            status = _outcome(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return status, output.read_text()


def run(ranks: int, main: Callable[..., int | None], *arguments: object, timeout: float = 300) -> str:
    """As :func:`launch` where all must end well."""
    status, output = launch(ranks, main, *arguments, timeout=timeout)
    assert status == 0, output[-3000:]
    return output


def _outcome(processes: list, timeout: float) -> int:
    for process in processes:
        process.start()
    running = list(processes)
    while running:
        ended = wait([process.sentinel for process in running], timeout)
        assert ended, f"no rank ended within {timeout} s"
        failed = [process.exitcode for process in running if process.sentinel in ended and process.exitcode]
        running = [process for process in running if process.sentinel not in ended]
        if failed:
            wait([process.sentinel for process in running], 2)  # another may have to say why
            return failed[0]
    return 0


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
