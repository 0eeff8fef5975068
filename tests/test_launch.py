"""What a process takes its rank from."""

import os

import pytest

from ufo_ds.parallel.launch import adopt_environment

# As Slurm sets them in the script of a job of 2 nodes x 2 tasks, and what srun adds in its last task.
SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
STEP = {**SCRIPT, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
INTERACTIVE = {**SCRIPT, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}  # the shell of `salloc`


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ("0", "0", "1")),
        (SCRIPT, ("0", "0", "1")),
        (INTERACTIVE, ("0", "0", "1")),
        (STEP, ("3", "1", "4")),
        ({**STEP, **TORCHRUN}, ("1", "1", "2")),
        ({**SCRIPT, **TORCHRUN}, ("1", "1", "2")),
    ],
)
def test_rank(given, wanted, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    assert adopt_environment() == int(wanted[2])
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == wanted
