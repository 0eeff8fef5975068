"""`ufo compare`: its statistics against known answers and simulated runs, its refusals, and two real runs."""

import json
import shutil
import sys

import numpy as np
import pytest
from scipy import stats

from benchmarks.compare_null import DEMO, PROTOCOLS, Population, any_verdict, found, most_alarms, split
from tests import tiny
from tests.distributed.test_training import train
from ufo_ds import cli, recipe_file
from ufo_ds.compare import compare as compare_arms
from ufo_ds.compare import read_arm, report
from ufo_ds.evaluation import classification, outcomes, statistics
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.evaluation.statistics import Difference, Items, cluster_variance
from ufo_ds.training.run_directory import RunDirectory


def uniform(cluster):
    cluster = np.asarray(cluster)
    return Items(np.full(len(cluster), 1 / len(cluster)), cluster.reshape(len(cluster), -1))


def test_variance_of_single_items_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=50)
    expected = values.var(ddof=1) / 50
    assert cluster_variance(values, uniform(range(50))) == pytest.approx(expected)


def test_variance_over_clusters_is_the_jackknife():
    """Leaving out one cluster after the other, of unequal sizes and with unequal weights."""
    generator = np.random.default_rng(1)
    cluster = generator.integers(0, 8, 60)
    weight, values = generator.dirichlet(np.ones(60)), generator.normal(size=60) + cluster
    without = [np.average(values[cluster != c], weights=weight[cluster != c]) for c in range(8)]
    expected = 7 / 8 * np.sum(np.square(without - weight @ values))
    assert cluster_variance(values, Items(weight, cluster[:, None])) == pytest.approx(expected)


def test_variance_is_what_a_cluster_bootstrap_finds():
    generator = np.random.default_rng(2)
    cluster = np.sort(generator.integers(0, 200, 1000))
    values = generator.normal(size=1000) + generator.normal(size=200)[cluster]
    of_cluster = [values[cluster == c] for c in range(200)]
    means = [np.mean(np.concatenate([of_cluster[c] for c in generator.integers(0, 200, 200)])) for _ in range(4000)]
    assert cluster_variance(values, uniform(cluster)) == pytest.approx(np.var(means), rel=0.1)


def test_variance_of_pairs_by_going_through_all_pairs_of_pairs():
    """Residuals of two pairs multiply where these share an identity: once, however many they share."""
    generator = np.random.default_rng(3)
    cluster, values = generator.integers(0, 30, (80, 2)), generator.normal(size=80)
    residual = (values - values.mean()) / 80
    share = [np.mean((cluster == c).any(1)) for c in range(30)]
    variance = 0.0
    for i, one in enumerate(cluster):
        for j, two in enumerate(cluster):
            common = set(one.tolist()) & set(two.tolist())
            if len(common) == 1:
                variance += residual[i] * residual[j] / (1 - share[common.pop()]) ** 2
            elif common:  # the same two identities: both sums, less one
                variance += residual[i] * residual[j] * (sum((1 - share[c]) ** -2 for c in common) - 1)
    assert cluster_variance(values, uniform(cluster)) == pytest.approx(29 / 30 * variance)


def test_variance_of_pairs_is_that_of_simulated_ones():
    generator = np.random.default_rng(4)
    fold = np.arange(600) % 10
    cluster = generator.integers(0, 20, (600, 2)) * 10 + fold[:, None]
    estimates, means = [], []
    for _ in range(1000):
        of_identity = generator.normal(size=200)
        values = of_identity[cluster].sum(1) + generator.normal(size=600)
        means.append(values.mean())
        estimates.append(cluster_variance(values, uniform(cluster)))
    assert np.mean(estimates) == pytest.approx(np.var(means), rel=0.15)


def test_where_runs_alone_differ_it_is_the_t_test():
    """Runs that are better or worse on all items alike: Student's two-sample t-test over their metrics."""
    generator = np.random.default_rng(5)
    base = generator.normal(size=400)
    a, b = generator.normal(0.5, 1, 3), generator.normal(0, 1, 4)
    difference = statistics.compare(base + a[:, None], base + b[:, None], uniform(range(400)))
    expected = stats.ttest_ind(a, b)
    assert difference.value == pytest.approx(a.mean() - b.mean())
    assert difference.p == pytest.approx(expected.pvalue, rel=1e-4)
    interval = expected.confidence_interval(0.95)
    assert difference.interval == pytest.approx((interval.low, interval.high), rel=1e-4)


def test_where_items_alone_differ_it_is_the_paired_t_test():
    """All seeds agree: a paired t-test over images, but for the one image more."""
    generator = np.random.default_rng(6)
    a, b = generator.normal(0.1, 1, 3000), generator.normal(0, 1, 3000)
    difference = statistics.compare(np.stack([a] * 3), np.stack([b] * 3), uniform(range(3000)))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert difference.interval == pytest.approx((interval.low, interval.high), rel=1e-3)


def test_runs_that_are_right_about_everything_are_not_proved_equal():
    right = np.ones((3, 24))
    difference = statistics.compare(right, right, uniform(range(24)))
    assert difference.p == 1
    assert difference.half_width() > 2 / 24


def test_p_is_where_the_interval_ends_at_zero():
    difference = Difference(0.03, [[(1e-4, 2e-4, 40)], [(3e-5, 3e-5, 9)]], (5e-5, 4))
    assert difference.half_width(difference.p) == pytest.approx(0.03)


def test_one_run_has_no_p_value():
    scores = np.random.default_rng(7).normal(size=(4, 50))
    assert statistics.compare(scores[:1], scores[1:], uniform(range(50))).p is None


def test_holm():
    """By hand: 3 x 0.01, then 2 x 0.02 = 0.04, then 1 x 0.03, raised to the one before."""
    assert statistics.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("seeds", [(3, 3), (5, 5), (2, 2)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_false_alarms(protocol, seeds):
    """At most 5%, within what 150 replicas can tell, whether arms differ on single items or not at all."""
    generator = np.random.default_rng(8)
    for sampled in (0.0, 0.4):
        alarms = [found(Population(protocol, generator, sampled).difference(seeds)) for _ in range(150)]
        assert sum(alarms) <= most_alarms(150)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_power(protocol):
    """A difference of four to six standard errors is found, and the right way round."""
    generator = np.random.default_rng(9)
    drawn = [Population(protocol, generator, 0.2, 0.03, effect=0.5).difference((3, 3)) for _ in range(60)]
    assert np.mean([found(d) and d.value > 0 for d in drawn]) > 0.85


def test_false_verdicts_over_benchmarks():
    generator = np.random.default_rng(10)
    alarms = sum(any_verdict(generator, (3, 3), 0.2) for _ in range(60))
    assert alarms <= most_alarms(60)


def test_all_splits_of_real_runs(tmp_path):
    """Four runs: three ways to make two arms of two; each is compared as `ufo compare` would."""
    for seed in range(4):
        write_run(tmp_path / f"run-{seed}", seed, ["classification", "retrieval"])
    paths = [tmp_path / f"run-{seed}" for seed in range(4)]
    figures, _ = split(paths)
    assert len(figures) == 4  # two benchmarks, their mean, and any verdict
    assert all(3 * rate == pytest.approx(round(3 * rate)) for rate in figures.values())
    with pytest.raises(SystemExit, match="3 seeds"):
        split(paths[:3])


def write_run(path, seed, protocols=PROTOCOLS, effect=0.0, items=300, test_set=0, flip=False, **recipe):
    """A run directory as training leaves it, with simulated outcomes: one task a protocol."""
    values = recipe_file.dump(DEMO)
    template = values["tasks"][0]
    values["tasks"] = []
    for protocol in protocols:
        shards = {"query": "q", "gallery": "g"} if protocol == "retrieval" else {"shards": "s"}
        benchmark = {"name": "test", "protocol": protocol, "flip": flip, **shards}
        values["tasks"].append(template | {"name": f"a_{protocol}", "benchmarks": [benchmark]})
    values |= {"seed": seed, "evaluation": {}, "schedule": {"steps": 7}, **recipe}
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(recipe_file.to_yaml(recipe_file.parse(values, "test")))
    for protocol in protocols:
        population = Population(protocol, np.random.default_rng(test_set), items=items, effect=effect)
        population.generator = np.random.default_rng([seed, len(path.name)])
        run = population.run(0)
        ones = np.ones(items, dtype=int)
        more = {"first_rank": ones, "inverse_penalty": ones, "label": ones, "rank": ones, "classes": np.array([2])}
        more |= {"similarity": np.zeros(items), "same": ones == 1}
        result = Outcomes(protocol, {"flip": True} if flip else {}, f"data {test_set}", run.arrays | more)
        outcomes.store(path, 7, {f"a_{protocol}/test": result})


def ufo(capsys, *arguments):
    """Status, what was printed, and what was said beside it."""
    sys.argv = ["ufo", *map(str, arguments)]
    status = cli.main()
    return status, *capsys.readouterr()


def error_of(capsys, *arguments):
    status, _, error = ufo(capsys, "compare", *arguments)
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def result_of(capsys, *arguments):
    status, output, _ = ufo(capsys, "compare", *arguments)
    assert status == 0
    return output


def test_two_arms(tmp_path, capsys):
    for seed in range(3):
        write_run(tmp_path / f"good-{seed}", seed, effect=1.0)
        write_run(tmp_path / f"plain-{seed}", seed)
    good, plain = tmp_path / "good-*", ",".join(str(tmp_path / f"plain-{seed}") for seed in range(3))
    result = json.loads(result_of(capsys, good, plain, "--json"))
    assert result["a"]["seeds"] == result["b"]["seeds"] == [0, 1, 2]
    assert result["verdicts"] == 4
    assert result["warnings"] == []
    assert {entry["verdict"] for entry in [*result["benchmarks"].values(), result["mean"]]} == {"A better"}
    retrieval = result["benchmarks"]["a_retrieval/test"]
    of_a, of_b = retrieval["metrics"]["mAP"]["a"], retrieval["metrics"]["mAP"]["b"]
    assert len(of_a) == len(of_b) == 3
    assert retrieval["difference"] == pytest.approx(np.mean(of_a) - np.mean(of_b))
    assert retrieval["interval"][0] < retrieval["difference"] < retrieval["interval"][1]
    assert result["mean"]["difference"] == pytest.approx(
        np.mean([entry["difference"] for entry in result["benchmarks"].values()])
    )
    swapped = json.loads(result_of(capsys, plain, good, "--json"))
    assert swapped["mean"]["verdict"] == "B better"
    assert swapped["mean"]["interval"] == pytest.approx([-x for x in result["mean"]["interval"][::-1]])
    table = result_of(capsys, good, plain)
    assert "A better" in table
    assert max(map(len, table.splitlines())) <= 100


def test_lines_fit_however_long_the_names(tmp_path):
    arms = []
    for which in "ab":
        path = tmp_path / which / ("long-" * 30)
        write_run(path, 0)
        arms.append(read_arm(str(path)))
    rows = compare_arms(*arms)
    for row in rows:
        row.name = row.name * 9
    assert max(map(len, report(*arms, rows))) <= 100


def test_an_arm_of_single_task_runs(tmp_path, capsys):
    for seed in range(2):
        write_run(tmp_path / f"joint-{seed}", seed)
        for protocol in PROTOCOLS:
            write_run(tmp_path / f"twin-{protocol}-{seed}", seed, [protocol])
    result = json.loads(result_of(capsys, tmp_path / "joint-*", tmp_path / "twin-*", "--json"))
    assert list(result["benchmarks"]) == [f"a_{protocol}/test" for protocol in PROTOCOLS]
    assert result["b"]["seeds"] == [0, 1]
    assert len(result["b"]["runs"]) == 6
    partly = json.loads(result_of(capsys, tmp_path / "joint-*", tmp_path / "twin-retrieval-*", "--json"))
    assert list(partly["benchmarks"]) == ["a_retrieval/test"]
    assert partly["mean"] is None
    assert "a_classification/test" in partly["warnings"][0]
    missing = [tmp_path / "twin-retrieval-0", tmp_path / "twin-retrieval-1", tmp_path / "twin-verification-0"]
    error = error_of(capsys, ",".join(map(str, missing)), tmp_path / "joint-*")
    assert "seed 1 has no a_verification/test" in error


def test_one_seed_cannot_tell(tmp_path, capsys):
    write_run(tmp_path / "one", 0, effect=3.0)
    write_run(tmp_path / "other-0", 0)
    write_run(tmp_path / "other-1", 1)
    result = json.loads(result_of(capsys, tmp_path / "one", tmp_path / "other-*", "--json"))
    assert result["verdicts"] == 0
    assert result["mean"]["interval"][0] > 0
    assert result["mean"]["verdict"] == "one seed cannot tell"


def test_warnings(tmp_path, capsys):
    write_run(tmp_path / "a", 0)
    write_run(tmp_path / "b0", 0, flip=True)
    write_run(tmp_path / "b1", 1, flip=True, optimizer={"lr": 0.5})
    result = json.loads(result_of(capsys, tmp_path / "a", tmp_path / "b*", "--json"))
    assert any("optimizer.lr is 0.003" in line and "0.5 in" in line for line in result["warnings"])
    assert sum("flip" in line for line in result["warnings"]) == 3


def test_refusals(tmp_path, capsys):
    write_run(tmp_path / "a", 0)
    write_run(tmp_path / "same_seed", 0)
    write_run(tmp_path / "shorter", 1, items=250)
    write_run(tmp_path / "other_names", 1, test_set=1)
    write_run(tmp_path / "retrieval", 1, ["retrieval"])
    write_run(tmp_path / "classification", 1, ["classification"])
    write_run(tmp_path / "unfinished", 1, schedule={"steps": 8})
    write_run(tmp_path / "damaged", 1)
    (tmp_path / "empty").mkdir()
    a = tmp_path / "a"
    assert "two arms, not 3" in error_of(capsys, a, a, a)
    assert "two arms, not 1" in error_of(capsys, a)
    assert "none'" in error_of(capsys, a, tmp_path / "none")
    assert "no run directory" in error_of(capsys, a, ",")
    assert "recipe.yaml" in error_of(capsys, a, tmp_path / "empty")
    error = error_of(capsys, f"{a},{tmp_path / 'same_seed'}", a)
    assert "same_seed" in error
    assert "of seed 0" in error
    assert "300 items" in error_of(capsys, a, tmp_path / "shorter")
    assert "other identities" in error_of(capsys, a, tmp_path / "other_names")
    assert "nothing to compare" in error_of(capsys, tmp_path / "retrieval", tmp_path / "classification")
    error = error_of(capsys, a, tmp_path / "unfinished")
    assert "step-00000008" in error
    assert "finish the training" in error
    (path,) = (tmp_path / "damaged" / "evaluations").glob("*/a_retrieval*")
    path.write_bytes(path.read_bytes()[:100])
    assert "is damaged" in error_of(capsys, a, tmp_path / "damaged")
    (path,) = (tmp_path / "damaged" / "evaluations").glob("*/a_classification*")
    path.unlink()
    (path,) = (tmp_path / "damaged" / "evaluations").glob("*/a_retrieval*")
    path.unlink()
    assert "a_retrieval.test.safetensors" in error_of(capsys, a, tmp_path / "damaged")


def test_going_on_drops_later_evaluations(tmp_path):
    """They are about to be made again, maybe at other steps."""
    kept = Outcomes("classification", {}, "digest", classification.outcomes(np.eye(2), np.arange(2)))
    for step in (6, 12):
        outcomes.store(tmp_path, step, {"a/b": kept})
    directory = RunDirectory(tmp_path, DEMO, {}, tensorboard=False)
    directory.begin(6, ranks=1)
    directory.close()
    assert [path.name for path in (tmp_path / "evaluations").iterdir()] == ["step-00000006"]


def test_real_runs(tmp_path, capsys):
    """Two trainings with other seeds: what is kept gives the recorded metrics; evaluated again it is the same; their
    comparison says that one seed each cannot tell. A run that may not be written into is evaluated all the same."""
    recipe = tiny.make(tmp_path)
    runs = [tmp_path / "runs" / f"seed-{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        train(1, recipe, run, "--seed", str(seed), "--tasks.stripes.benchmarks.stripes.flip", "true")
        recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in recorded:
            if line.pop("kind") == "evaluation":
                step = line.pop("step")
                keys = {key.rsplit("/", 1)[0] for key in line}
                kept = outcomes.flatten({key: outcomes.load(run, step, key) for key in keys})
                assert kept == line
    values = json.loads(result_of(capsys, *runs, "--json"))
    assert values["mean"]["verdict"] == "one seed cannot tell"
    assert values["warnings"] == []
    last = [line for line in map(json.loads, (runs[0] / "metrics.jsonl").open()) if line["kind"] == "evaluation"][-1]
    last = {key: value for key, value in last.items() if "/" in key}
    for key, entry in values["benchmarks"].items():
        assert entry["a"] == pytest.approx(last[f"{key}/{entry['metric']}"])

    shutil.rmtree(runs[0] / "evaluations")
    assert "ufo evaluate" in error_of(capsys, *runs)
    assert ufo(capsys, "evaluate", runs[0], "--last")[0] == 0
    again = json.loads(result_of(capsys, *runs, "--json"))
    for key, entry in again["benchmarks"].items():
        assert entry["difference"] == pytest.approx(values["benchmarks"][key]["difference"], abs=1e-6)

    shutil.rmtree(runs[0] / "evaluations")
    (runs[0] / "evaluations").write_text("in the way")
    status, output, error = ufo(capsys, "evaluate", runs[0], "--last", "--json")
    assert status == 0
    assert json.loads(output) == pytest.approx(last, abs=1e-6)
    assert "not kept" in error
