"""``ufo <verb>``: every entry script under one command."""

import importlib
import sys

from ufo_ds.errors import UserError, run

VERBS = {
    "train": "train a recipe (with several processes: deepspeed ufo_ds/train.py)",
    "shards": "turn images into WebDataset shards with a manifest; verify them",
    "data": "look at a recipe's data: figures, a batch as training sees it, test images that training has seen",
    "status": "how far a run is, from its files alone: speed, time left, checkpoint, restarts, metrics",
    "plan": "say what a run would need: memory, FLOPs, traffic and time a step, on any number of GPUs",
    "verify": "proofs that anybody can run: a checkpoint goes on at any other topology, a change left tasks untouched",
    "evaluate": "run the benchmarks of a trained run or of one model",
    "report": "the results of runs as one page: metrics with intervals, curves, pictures, routes, costs",
    "compare": "compare two recipes by their runs, with intervals over seeds and test items",
    "order": "sort a run's heads and channels by importance, so that leading slices keep what matters",
    "search": "find the subnets of an elastic model that are best for what they cost, within limits",
    "extract": "cut a task, or a smaller subnet of it, out of a run as a dense Hugging Face model",
    "distill": "make a small network, of another kind if need be, that does what a model does",
    "export": "write a model as an ONNX file, in fp32 and int8, with a certificate that it computes the same",
    "extend": "add a task to a trained run, with little data and few new parameters",
    "remove": "take a task out of a trained run",
    "latency": "measure how long subnets take on a device, as a profile that predicts it of any other",
    "index": "make an index of images, in which a model finds those most like another",
    "predict": "say what an image shows, which images are like it, or whether two show the same",
}
_MODULES = {"data": "data_report"}  # of verbs that are not named as their module is


def _dispatch(argv: list[str] | None) -> None:
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        print("usage: ufo VERB ...   (ufo VERB --help)\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items()))
        return
    if verb not in VERBS:
        raise UserError(f"no verb {verb!r}: use one of {', '.join(VERBS)}")
    from ufo_ds.parallel.launch import name_accelerator  # imports torch, which --help and wrong verbs do without

    name_accelerator()
    importlib.import_module(f"ufo_ds.{_MODULES.get(verb, verb)}").main(rest)


def main() -> int:
    return run(_dispatch, sys.argv[1:])
