"""Subnets of an elastic run searched in jobs."""

import json

import pytest

from tests import elastic_run
from tests.small_run import make_model, write_checkpoint

pytestmark = pytest.mark.slurm

EVALUATIONS = 60


def test_an_array_of_searches_goes_on_after_a_warning(cluster):
    run = cluster.place / "elastic run"
    run.mkdir()
    elastic_run.write_shards(run)
    write_checkpoint(run / "checkpoints", make_model(elastic_run.make_recipe(run)))
    words = [run.name, "digits", "glyphs", "--", "--evaluations", EVALUATIONS]
    job = cluster.submit("search.sh", *words, options=("--array=1-1",))
    found = run / "search" / "glyphs"
    evaluated = found / "evaluations.jsonl"
    cluster.wait_for(lambda: evaluated.exists() and evaluated.read_text().count("\n") > 2, job)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert cluster.end(job) == "COMPLETED", cluster.output(job)
    assert cluster.shown(job, "Restarts") == ["1"]
    assert "subnets evaluated so far, in the queue again" in cluster.output(job)
    assert json.loads((found / "front.json").read_text())["evaluated"] == EVALUATIONS
    assert evaluated.read_text().count("\n") == EVALUATIONS
    assert [path.name for path in (run / "search").iterdir()] == ["glyphs"]
