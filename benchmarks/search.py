"""Fronts of accuracy against FLOPs: what search finds beside random choice with the same number of evaluations.

python benchmarks/search.py --data architectures.json       # or GP_NAS_TRACK2; --quick: within a minute

The data are those of the performance prediction track of the CVPR 2022 NAS challenge (see benchmarks/predictor.py):
subnets of a ViT-B supernet and their ranks on eight tasks. Both choose among the subnets listed there; to evaluate one
is to look its rank up. Both begin with the largest and the smallest one. ``ratio``: the hypervolume of what was
evaluated over that of all, mean over seeds; ``wins``: the share of tasks and seeds in which search has more of it than
random choice. The last line is one JSON object.
"""

import argparse
import json
import os
from typing import Any

import numpy as np
import torch

from benchmarks.predictor import load
from ufo_ds.model import cost
from ufo_ds.subnets import pareto, search
from ufo_ds.subnets.predictor import Choices

EVALUATIONS = (20, 40, 80)
HEADS, RATIOS, DEPTHS = (10, 11, 12), (3.0, 3.5, 4.0), (10, 11, 12)
