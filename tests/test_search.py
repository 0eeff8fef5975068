"""Fronts and the search for them, against enumeration, integration and slow obvious formulas."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import search as benchmark
from tests.test_cost import elastic_recipe
from ufo_ds.errors import UserError
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.cost import joint_cost
from ufo_ds.model.spec import SubnetSpec, routes_of
from ufo_ds.subnets import pareto, search
from ufo_ds.subnets.predictor import Choices
from ufo_ds.subnets.search_space import ElasticSpace, check_limits


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def slow_front(accuracy_N, costs_NM):
    rows = [(-a, *costs) for a, costs in zip(accuracy_N, costs_NM.tolist(), strict=True)]
    return [
        not any((all(x <= y for x, y in zip(other, row, strict=True)) and other != row) for other in rows)
        and row not in rows[:n]
        for n, row in enumerate(rows)
    ]


@pytest.mark.parametrize("costs", [1, 2, 3])
def test_a_front_is_what_nothing_beats(costs):
    generator = np.random.default_rng(costs)
    for _ in range(30):
        accuracy_N, costs_NM = generator.integers(0, 6, 20) / 5, generator.integers(0, 6, (20, costs))
        assert pareto.on_front(accuracy_N, costs_NM).tolist() == slow_front(accuracy_N, costs_NM)


@pytest.mark.parametrize("costs", [1, 2, 3])
def test_hypervolume_and_expected_gain_are_integrals(costs):
    """On a lattice volumes are counts of cells; a gain is the mean over draws of what it adds to them."""
    generator = np.random.default_rng(costs)
    bounds_M = np.full(costs, 6.0)
    cells = np.array(list(itertools.product(range(8), *[range(6)] * costs)))  # lower corners, accuracy first

    def count(accuracy_N, costs_NM):
        beaten_NC = (cells[None, :, 0] < accuracy_N[:, None]) & (cells[None, :, 1:] >= costs_NM[:, None]).all(2)
        return int(beaten_NC.any(0).sum())

    for _ in range(5):
        accuracy_N, costs_NM = generator.integers(0, 8, 10), generator.integers(0, 9, (10, costs))
        within = (costs_NM <= 6).all(1)
        before = count(accuracy_N, costs_NM)
        assert pareto.hypervolume(accuracy_N, costs_NM, 0.0, bounds_M) == pytest.approx(before)
        sure_P, of_sure_PM = generator.integers(0, 8, 40), generator.integers(0, 7, (40, costs))
        gain_P = pareto.expected_gain(
            sure_P, np.zeros(40), of_sure_PM, accuracy_N[within], costs_NM[within], 0.0, bounds_M
        )
        for gain, accuracy, of_one in zip(gain_P, sure_P, of_sure_PM, strict=True):
            after = count(np.append(accuracy_N, accuracy), np.concatenate([costs_NM, of_one[None]]))
            assert gain == pytest.approx(after - before, abs=1e-9)
    mean, std = 4.2, 1.5
    values, weights = np.polynomial.hermite_e.hermegauss(200)
    drawn = pareto.expected_gain(
        mean + std * values, np.zeros(200), np.tile(of_sure_PM[:1], (200, 1)), accuracy_N, costs_NM, 0.0, bounds_M
    )
    [gain] = pareto.expected_gain(
        np.array([mean]), np.array([std]), of_sure_PM[:1], accuracy_N, costs_NM, 0.0, bounds_M
    )
    assert gain == pytest.approx(np.average(drawn, weights=weights), rel=0.01)


def table_space(limit=np.inf):
    """Depth of 2 or 3, and three widths in each of 3 layers: 36 subnets; two costs."""
    highest_G = np.array([1, 2, 2, 2])

    def tidy(levels_NG):
        return np.where((np.arange(4) == 3) & (levels_NG[:, :1] == 0), 0, levels_NG)

    def choices(levels_NG):
        layers_NUL = levels_NG[:, None, 1:].copy()
        layers_NUL[levels_NG[:, 0] == 0, :, 2] = -1
        return [Choices(levels_NG[:, :1], layers_NUL, (1,), (2,))]

    def costs(levels_NG):
        of_layers = 1 + levels_NG[:, 1:] * np.array([1.0, 1.1, 1.2])
        of_layers[levels_NG[:, 0] == 0, 2] = 0
        return np.stack([of_layers.sum(1), of_layers.max(1)], 1)

    limits_A = np.array([limit, np.inf])
    return search.Space(highest_G, tidy, choices, costs, [0], limits_A, [slice(0, 4)])


def everything(space):
    levels = np.array(list(itertools.product(*[range(most + 1) for most in space.highest_G])))
    return np.unique(space.tidy(levels), axis=0)


def formula(levels_NG):
    """The first layer counts most, less and less the wider; with something that no sum of its choices is."""
    gain = np.sqrt(levels_NG[:, 1:] + 1) * np.array([1.0, 0.5, 0.4])
    gain[levels_NG[:, 0] == 0, 2] = 0
    return (1 - np.exp(-gain.sum(1)) + 0.01 * np.sin(17 * gain.sum(1)))[:, None]


def known_of(space, rows, metrics=formula):
    levels_NG = np.array(rows, dtype=int).reshape(len(rows), len(space.highest_G))
    return search.Known(levels_NG, metrics(levels_NG), space.costs(levels_NG), metrics(space.ends)[0])


def searched(space, evaluations, seed, rows=(), stop=None):
    rows = list(rows)
    while len(rows) < (evaluations if stop is None else stop):
        found = search.following(space, known_of(space, rows), evaluations, seed)
        if found is None:
            break
        rows.append(found)
    return rows


@pytest.mark.parametrize("limit", [np.inf, 6.0])
def test_few_evaluations_find_the_front_of_all(limit):
    """A third of the subnets: most of the true front, and more of it than random choice."""
    space = table_space(limit)
    levels_NG = everything(space)
    assert len(levels_NG) == 36
    known = known_of(space, searched(space, 12, 0))
    assert len({tuple(row) for row in known.levels_NG.tolist()}) == 12
    assert space.within(known.costs_NA[1:]).all()
    found, truth = search.front(space, known, 0), search.front(space, known_of(space, levels_NG), 0)
    bounds_M, floor = space.bounds(known.costs_NA[:2]), float(truth.accuracy_N.min())

    def volume(of):
        return pareto.hypervolume(of.accuracy_N, of.costs_NA[:, :1], floor, bounds_M)

    assert space.within(found.costs_NA).all()
    assert volume(found) > 0.98 * volume(truth)
    kept_NG = levels_NG[space.within(space.costs(levels_NG))]
    by_chance = []
    for seed in range(20):
        drawn = np.random.default_rng(seed).choice(len(kept_NG), 12, replace=False)
        by_chance.append(volume(search.front(space, known_of(space, kept_NG[drawn]), 0)))
    assert volume(found) > np.quantile(by_chance, 0.8)


def test_what_follows_depends_on_what_is_known_and_the_seed_alone():
    space = table_space(7.0)
    whole = searched(space, 10, 3)
    for stop in (1, 4, 8):
        again = searched(space, 10, 3, rows=searched(space, 10, 3, stop=stop))
        assert np.array_equal(again, whole)


def test_a_search_ends_where_nothing_is_left():
    space = table_space(3.5)
    kept = space.within(space.costs(everything(space))).sum()
    rows = searched(space, 30, 0)
    assert len(rows) == kept + 1  # and the largest


def test_nsga2_finds_the_front_within_limits():
    """Of a formula known at every point, by enumeration."""
    space = table_space(6.5)
    levels_NG = everything(space)
    truth = search.front(space, known_of(space, levels_NG), 0)

    def objectives(of_NG):
        costs_NA = space.costs(of_NG)
        return formula(of_NG)[:, 0], costs_NA[:, :1], search.excess(space, costs_NA)

    found_NG = pareto.nsga2(objectives, space.highest_G, space.ends, space.tidy, 20, 0)
    assert {tuple(row) for row in found_NG.tolist()} == {tuple(row) for row in truth.levels_NG.tolist()}


# --- subnets of an elastic model --------------------------------------------------------------------------------------


def elastic_space(tasks):
    recipe = elastic_recipe()
    names = [task.name for task in recipe.tasks][:tasks]
    whole = [SubnetSpec(name, *whole_path(recipe)) for name in names]
    return ElasticSpace(recipe, whole, dict.fromkeys(names, 5))


def whole_path(recipe):
    backbone = recipe.model.backbone
    routes = {u: tuple("shared" for _ in layers) for u, layers in routes_of(recipe, recipe.tasks[0].name).items()}
    return routes, Architecture.of(backbone)


@pytest.mark.parametrize("tasks", [1, 2])
def test_levels_are_subnets(tasks):
    space = elastic_space(tasks)
    found = space.searched(["parameters"], {})
    largest, smallest = found.ends
    assert [spec.architecture for spec in space.specs(largest)] == [space.sizes.largest] * tasks
    assert [spec.architecture for spec in space.specs(smallest)] == [space.sizes.smallest] * tasks
    drawn_NG = found.draw(50, np.random.default_rng(0))
    assert np.array_equal(found.tidy(drawn_NG), drawn_NG)
    for row, costs_A in zip(drawn_NG, found.costs(drawn_NG), strict=True):
        specs = space.specs(row)
        assert space.specs(space.levels(specs)) == specs
        cost = joint_cost(space.recipe, specs, space.classes)
        assert costs_A.tolist() == [cost.parameters, cost.flops]
    for of_task, part in zip(space.choices(drawn_NG), space.parts, strict=True):
        for n, row in enumerate(drawn_NG):
            once, heads, _ = space.sizes.levels(space.specs(row)[space.parts.index(part)].architecture)
            assert of_task.once_NC[n].tolist() == once
            assert (of_task.layers_NUL[n, 0] == -1).tolist() == [level == -1 for level in heads]
            assert (of_task.layers_NUL[n, 0] == heads).all()


def test_subnets_of_several_tasks_are_combined_anew():
    """Two tasks whose metrics are known of three subnets each: the front of all nine pairs, by enumeration."""
    space = elastic_space(2)
    found = space.searched(["parameters"], {})
    rows_NG = found.draw(60, np.random.default_rng(1))[[5, 25, 40]]
    assert all(len(np.unique(rows_NG[:, part], axis=0)) == 3 for part in space.parts)
    metrics_NT = np.array([[0.2, 0.5], [0.6, 0.3], [0.4, 0.8]])
    known = search.Known(rows_NG, metrics_NT, found.costs(rows_NG), np.array([0.8, 1.0]))
    pairs = list(itertools.product(range(3), repeat=2))
    levels_NG = np.array([np.concatenate([rows_NG[i, space.parts[0]], rows_NG[j, space.parts[1]]]) for i, j in pairs])
    accuracy_N = np.array([(metrics_NT[i, 0] / 0.8 + metrics_NT[j, 1] / 1.0) / 2 for i, j in pairs])
    kept = slow_front(accuracy_N, found.costs(levels_NG)[:, :1])
    front = search.front(found, known, 0)
    assert sorted(front.accuracy_N.tolist()) == pytest.approx(sorted(accuracy_N[kept].tolist()))
    assert {tuple(row) for row in front.levels_NG.tolist()} <= {tuple(row) for row in levels_NG.tolist()}


def test_limits_that_nothing_satisfies_are_told_with_what_the_smallest_needs():
    space = elastic_space(1)
    parameters, flops = space.costs(space.searched([], {}).ends[1:])[0]
    check_limits(space, {"parameters": parameters, "flops": flops})
    with pytest.raises(UserError, match=rf"^--limit flops={flops - 1:g}: .*would need flops={flops:.0f}$"):
        check_limits(space, {"parameters": parameters, "flops": flops - 1})


def test_benchmark_reads_files_of_the_contests_form(tmp_path, monkeypatch, capsys):
    """Made-up subnets whose rank is their size: all are on the front."""
    generator, values = np.random.default_rng(0), {}
    for n in range(60):
        depth = int(generator.integers(10, 13))
        levels = generator.integers(1, 4, (depth, 2))
        code = "jkl"[depth - 10] + "".join(f"{heads}{ratio}1" for heads, ratio in levels).ljust(36, "0")
        size = benchmark.flops(3 - levels[:, 0], 3 - levels[:, 1])
        values[f"arch{n}"] = {"size_rank": -size, "arch": code}
    (tmp_path / "all.json").write_text(json.dumps(values))
    monkeypatch.setattr(sys, "argv", ["search.py", "--data", str(tmp_path / "all.json"), "--quick"])
    benchmark.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.9 < found["figures"]["hypervolume_search_20"] <= 1
    assert found["bars"]["ratio_20"]["ok"]
