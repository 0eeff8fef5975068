"""A margin head of 100,000 classes on 4 gloo ranks: exactness, memory and time with its rows spread over the ranks.

    python benchmarks/sharded_head.py [--quick]

The peers, in the same run: one process with all samples and rows, and 4 ranks that have all rows each. All are the head
of the package with CosFace, forward and backward, on one thread a rank. Memory is counted, not sampled: bytes of the
classifier's parameter, of its gradient, and of what autograd keeps between forward and backward.

Of the differences most is the one process's: torch's cross-entropy rounds the logarithm of each probability.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ufo_ds.model.heads import TaskHead
from ufo_ds.parallel.collectives import RankGroup
from ufo_ds.parallel.placement import share
from ufo_ds.recipe_task import CosFace, Head, Loss
from ufo_ds.seeding import normal_elements, torch_generator

RANKS, CLASSES = 4, 100_000


def make(dim: int, sampled: float, group: RankGroup | None, sharded: bool) -> TaskHead:
    head = TaskHead(
        Head(type="margin", sampled_negatives=sampled), dim, CLASSES, Loss(cosface=CosFace()), ("benchmark",)
    )
    if group is not None:
        head.set_group(group, sharded)
    rows, weight = head.classifier.rows, head.classifier.weight
    with torch.no_grad():
        head.neck.weight.fill_(1.0)
        weight.zero_()
        elements = range(rows.start * dim, rows.stop * dim)
        weight[: len(rows)] = 0.01 * normal_elements(elements, "rows").view(-1, dim)
    return head


class Run:
    """Forward and backward of a head on this process's samples."""

    def __init__(self, head: TaskHead, features: torch.Tensor, labels: torch.Tensor, total: int):
        self.head, self.labels, self.total = head, labels, total
        self.features = features.clone().requires_grad_()

    def step(self) -> torch.Tensor:
        self.head.zero_grad()
        self.features.grad = None
        loss = self.head(self.features, self.labels, self.total, (0, 0)).sum()
        loss.backward()
        return loss.detach()

    def kept_bytes(self) -> int:
        """Of all tensors that a forward keeps for the backward, parameters left out."""
        parameters = {p.untyped_storage().data_ptr() for p in self.head.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.head(self.features, self.labels, self.total, (0, 0)).sum()
            total = sum(kept.values())
        loss.backward()  # ranks that do not would be waited for
        return total

    def memory(self) -> dict[str, int]:
        kept, weight = self.kept_bytes(), self.head.classifier.weight
        return {"parameter": weight.nbytes, "gradient": weight.grad.nbytes, "kept": kept}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def on_first(act: Callable[[], None]) -> None:
    if dist.get_rank() == 0:
        act()
    dist.barrier()


def measure(dim: int, batch: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), RankGroup(dist.new_group(range(RANKS)))
    features = torch.randn(batch, dim, generator=torch_generator("features"))
    labels = torch.randint(0, CLASSES, (batch,), generator=torch_generator("labels"))
    mine = share(range(batch), RANKS, rank)
    rows = slice(mine.start, mine.stop)
    figures: dict[str, float] = {"classes": CLASSES, "dim": dim, "batch": batch}
    worst = 0.0
    for name, sampled in (("", 1.0), ("sampled_", 0.1)):
        alone: list[Run] = []
        on_first(lambda sampled=sampled, alone=alone: alone.append(
            Run(make(dim, sampled, None, False), features, labels, batch)
        ))  # fmt: skip
        spread = Run(make(dim, sampled, group, True), features[rows], labels[rows], batch)
        weight = spread.head.classifier.weight

        # Exactness: every rank's rows and samples against those of the one process.
        loss = group.all_reduce(spread.step())
        grad_rows = [torch.empty_like(weight) for _ in range(RANKS)] if rank == 0 else None
        dist.gather(weight.grad, grad_rows)
        grad_features = group.all_gather(spread.features.grad, group.counts(batch))
        if rank == 0:
            assert grad_rows is not None
            wanted = alone[0].step()
            reference = alone[0].head.classifier.weight.grad
            figures[f"{name}loss_difference"] = relative(loss, wanted)
            figures[f"{name}features_difference"] = relative(grad_features, alone[0].features.grad)
            figures[f"{name}rows_difference"] = relative(torch.cat(grad_rows)[:CLASSES], reference)
            figures[f"{name}rows_with_gradient"] = int(reference.any(1).sum())
            worst = max(worst, *(v for key, v in figures.items() if key.endswith("_difference")))
            del grad_rows, reference
        dist.barrier()

        # Memory and time, each peer's in turn.
        memory = spread.memory()
        times: dict[str, list[float]] = {"alone": [], "replicated": [], "sharded": []}
        replicated = Run(make(dim, sampled, group, False), features[rows], labels[rows], batch)
        of_replicated = replicated.memory()
        for _ in range(rounds):
            for kind, run in (("sharded", spread), ("replicated", replicated)):
                dist.barrier()
                clock = time.perf_counter()
                run.step()
                if kind == "replicated":  # whose gradients are still to be added up
                    dist.all_reduce(run.head.classifier.weight.grad)
                dist.barrier()
                times[kind].append(time.perf_counter() - clock)
            clock = time.perf_counter()
            on_first(lambda alone=alone: alone[0].step() and None)
            times["alone"].append(time.perf_counter() - clock)
        everyone: list = [None] * RANKS
        dist.all_gather_object(everyone, (memory, of_replicated))
        if rank == 0:
            of_one = alone[0].memory()
            for key in memory:
                figures[f"{name}{key}_bytes_one_process"] = of_one[key]
                figures[f"{name}{key}_bytes_replicated"] = max(other[1][key] for other in everyone)
                figures[f"{name}{key}_bytes_sharded"] = max(other[0][key] for other in everyone)
            for kind, seconds in times.items():
                figures[f"{name}seconds_{kind}"] = round(statistics.median(seconds), 4)
        del spread, replicated, alone
        dist.barrier()
    if rank == 0:

        def total(kind: str) -> float:
            return sum(figures[f"{key}_bytes_{kind}"] for key in ("parameter", "gradient", "kept"))

        share_of_one = total("sharded") / total("one_process")
        figures["sharded_share_of_one_process"] = share_of_one
        figures["sharded_share_of_replicated"] = total("sharded") / total("replicated")
        bars = {
            "largest_difference": {"value": worst, "bar": 1e-5, "ok": worst <= 1e-5},
            # A quarter, and the features of all ranks, which every rank has.
            "memory_share_of_one_process": {"value": share_of_one, "bar": 0.26, "ok": share_of_one <= 0.26},
        }
        for key, value in figures.items():
            print(f"{key:<36} {value:g}")
        print(json.dumps({"benchmark": "sharded_head", "figures": figures, "bars": bars}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller features and batch, two rounds")
    quick = parser.parse_args().quick
    if "RANK" in os.environ:
        measure(*(64, 64, 2) if quick else (256, 256, 5))
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    sys.exit(subprocess.run([*command, __file__, *sys.argv[1:]], env=environment).returncode)


if __name__ == "__main__":
    main()
