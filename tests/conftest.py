"""Tests run on the CPU, one thread each: several of them start several processes."""

import os

import pytest
import torch

from tests.small_run import (
    CLASSES,
    make_model,
    make_recipe,
    write_checkpoint,
)
from ufo_ds import checkpoint
from ufo_ds.checkpoint import Reader
from ufo_ds.model.loading import spec_of
from ufo_ds.subnets import extraction

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A verb in this process may note in the environment that it is alone; what a test changes is undone."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def model():
    return make_model(make_recipe())


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    """A run directory with one checkpoint."""
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run / "checkpoints", model, metrics={"digits/digits/top1": 0.9})
    return run


@pytest.fixture
def reader(run):
    return Reader(checkpoint.of_run(run))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, run):
    """Both tasks cut out: not to be changed."""
    directory = tmp_path_factory.mktemp("extracted")
    reader = Reader(checkpoint.of_run(run))
    for task in CLASSES:
        extraction.extract(reader, spec_of(reader, task), directory / task)
    return directory
