"""`ufo report`: its figures against slow or other implementations, the page against its JSON and in a browser."""

import contextlib
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import t as student
from sklearn import metrics

from tests import tiny
from ufo_ds import cli, recipe_file, report
from ufo_ds.errors import run
from ufo_ds.evaluation import outcomes, statistics
from ufo_ds.evaluation.outcomes import Outcomes
from ufo_ds.evaluation.statistics import Items
from ufo_ds.reporting import details, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def found_of(seed, data="d"):
    """What an evaluation of the tiny recipe may find, with the arrays of each protocol."""
    draw = np.random.default_rng(seed)
    label = np.repeat([0, 1, 2], 8)
    predicted = np.where(draw.random(24) < 0.7, label, draw.integers(0, 3, 24))
    query = np.arange(36)
    precision = draw.random(36)
    gallery = np.stack([draw.permutation(36)[:10] for _ in range(12)])
    shown = draw.permutation(36)[:12]
    similarity = draw.normal(size=20).astype(np.float32)
    pairs = draw.integers(0, 20, (20, 2))
    return {
        "colours/colours": Outcomes("classification", True, data, {
            "right": predicted == label, "label": label, "predicted": predicted, "classes": np.array([3]),
            "rank": np.where(predicted == label, 1, draw.integers(2, 4, 24)),
        }),
        "stripes/stripes": Outcomes("retrieval", {}, data, {
            "query": query, "identity": query // 6, "average_precision": precision, "inverse_penalty": precision / 2,
            "first_rank": draw.integers(1, 40, 36), "relevant": np.full(36, 3), "candidates": np.full(36, 33),
            "shown": shown, "shown_top": np.where(draw.random((12, 10)) < 0.9, gallery, -1),
            "shown_right": draw.random((12, 10)) < 0.5,
        }),
        "stripes/lfw": Outcomes("verification", {}, data, {
            "right": draw.random(20) < 0.8, "fold": np.arange(20) % 2, "threshold": np.full(20, 1.25),
            "similarity": similarity, "same": np.arange(20) % 2 == 1, "first": pairs[:, 0], "second": pairs[:, 1],
            "identity": pairs // 4,
        }),
    }  # fmt: skip


def make_run(path, recipe_path, seed, *, data="d"):
    """A run directory without checkpoints: two evaluations, losses and the course of learned routes."""
    recipe = recipe_file.load(str(recipe_path), [("seed", str(seed))])
    path.mkdir()
    (path / "recipe.yaml").write_text(recipe_file.to_yaml(recipe))
    lines = []
    for step in range(1, 13):
        losses = {"colours/cross_entropy": 2 / step, "stripes/cosface": 3 / step, "stripes/triplet": float("nan")}
        lines.append({"step": step, "kind": "train", "loss": 5 / step, **losses, "learning_rate": 0.1 / step})
        if step in (6, 12):
            found = found_of(step + seed, data)
            outcomes.store(path, step, found)
            lines.append({"step": step, "kind": "evaluation", **outcomes.flatten(found)})
        if step < 6:
            own = {"colours": {"ffn": [0.5 + step / 20, 0.5 - step / 20]}, "stripes": {"ffn": [0.2, None]}}
            lines.append({"step": step, "kind": "routes", "temperature": 5.0, "changed_at": 1, "own": own})
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 13, "ki')
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    text = tiny.make(root).read_text().replace("name: stripe_pairs", "name: lfw")
    (root / "tiny.yaml").write_text(text)
    make_run(root / "first", root / "tiny.yaml", 0)
    make_run(root / "second", root / "tiny.yaml", 1)
    return root


@pytest.fixture(scope="module")
def made(root):
    """The page of two runs, and its figures as `--json` prints them."""
    arguments = [str(root / "first"), str(root / "second"), "--out", str(root / "page.html"), "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(cli._dispatch, ["report", *arguments]) == 0
    return root / "page.html", json.loads(printed.getvalue())


class Page(HTMLParser):
    """Figures shown, the JSON, pictures and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.figures, self.json, self.images, self.addresses, self._in = [], None, [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._in = None
        if "data-figure" in attributes:
            self._in = (attributes["data-figure"], attributes["data-form"])
        if attributes.get("id") == "figures":
            self._in = "json"
        if tag == "img":
            self.images.append(attributes["src"])
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]

    def handle_data(self, data):
        if self._in == "json":
            self.json = json.loads(data)
        elif self._in is not None:
            self.figures.append((*self._in, data))
        self._in = None


def at(values, pointer):
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


SCALE = {"percent": 100, "percent2": 100, "signed": 100, "millions": 1e-6, "billions": 1e-9}


def test_the_page_shows_what_its_json_says(made):
    path, printed = made
    shown = Page(path.read_text())
    assert shown.json == printed
    assert len(shown.figures) > 100
    for pointer, form, text in shown.figures:
        value = at(printed, pointer)
        if form == "text":
            assert text == str(value)
            continue
        number = text.replace(",", "").replace("\N{MINUS SIGN}", "-")
        decimals = len(number.partition(".")[2])
        assert float(number) == pytest.approx(value * SCALE.get(form, 1), abs=0.5000001 * 10**-decimals), pointer
    everything = {pointer for pointer, _, _ in shown.figures}
    for key in ("colours~1colours", "stripes~1stripes", "stripes~1lfw"):
        for number in (0, 1):
            for name in ("value", "low", "high"):
                assert f"/benchmarks/{key}/runs/{number}/{name}" in everything
    assert "/benchmarks/stripes~1lfw/published/accuracy/1/value" in everything


def test_the_page_stands_alone(made):
    path, _ = made
    text = path.read_text()
    shown = Page(text)
    assert all(address.startswith(("#", "data:")) for address in shown.addresses)
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "url(" not in text
    assert "@import" not in text
    assert len(text) < 5e6
    # 3 rank lists of a query and up to 10, 4 x 3 pictures of pairs, up to 3 mistakes; of two runs
    lists = made[1]["benchmarks"]["stripes/stripes"]["runs"]
    wanted = sum(1 + len(one["top"]) for r in lists for one in r["rank_lists"])
    wanted += sum(2 * len(p) for r in made[1]["benchmarks"]["stripes/lfw"]["runs"] for p in r["hardest"].values())
    wanted += sum(len(r["mistakes"]) for r in made[1]["benchmarks"]["colours/colours"]["runs"])
    assert len(shown.images) == wanted


def test_figures_of_the_last_evaluation(made, root):
    _, values = made
    assert [run["step"] for run in values["runs"]] == [12, 12]
    for number in (0, 1):
        found = found_of(12 + number)
        for key, benchmark in values["benchmarks"].items():
            result = benchmark["runs"][number]
            assert result["metrics"] == pytest.approx(found[key].metrics())
            assert result["value"] == pytest.approx(result["metrics"][benchmark["metric"]])
            assert result["low"] <= result["value"] <= result["high"]
            assert result["course"]["step"] == [6, 12]
            earlier = found_of(6 + number)[key].metrics()
            for name, course in result["course"]["metrics"].items():
                assert course == pytest.approx([earlier[name], result["metrics"][name]])
    difference = values["benchmarks"]["stripes/stripes"]["differences"][0]
    a, b = (found_of(12 + number)["stripes/stripes"] for number in (0, 1))
    assert difference["value"] == pytest.approx(np.mean(b.scores - a.scores))
    assert values["benchmarks"]["colours/colours"]["runs"][0]["confusion"]["classes"] == [
        f"colour{i}" for i in range(3)
    ]
    training = values["runs"][0]["training"]
    assert training["tasks"]["stripes"]["cosface"] == [3 / step for step in range(1, 13)]
    assert training["tasks"]["stripes"]["triplet"] == [None] * 12
    routes = values["runs"][0]["routes"]["of_tasks"]
    assert routes["colours"] == {"embed": ["own"], "norm": ["shared"] * 3, "attn": ["shared"] * 2,
                                 "ffn": ["own", "shared"]}  # fmt: skip
    assert routes["stripes"]["ffn"] == ["shared", "learned"]  # of the second nothing was recorded


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95, 1.0])
def test_interval_inverts_the_test_of_a_share(share):
    """Independent items: where |p - theta| = t sqrt(theta (1 - theta) / n), as a quadratic equation."""
    score = (np.arange(40) < 40 * share).astype(float)
    low, high = statistics.interval(score, Items(np.full(40, 1 / 40), np.arange(40)[:, None]))
    n, t = (39 if 0 < share < 1 else 40), student.ppf(0.975, 39)  # the unbiased variance of a share has n - 1
    roots = np.sort(np.roots([1 + t**2 / n, -2 * share - t**2 / n, share**2]))
    np.testing.assert_allclose([low, high], roots, atol=1e-7)


def test_interval_counts_clusters():
    """Eight copies of each item say no more than one; a single cluster says nothing."""
    score = np.random.default_rng(0).random(30)
    once = statistics.interval(score, Items(np.full(30, 1 / 30), np.arange(30)[:, None]))
    items = Items(np.full(240, 1 / 240), np.repeat(np.arange(30), 8)[:, None])
    np.testing.assert_allclose(statistics.interval(np.repeat(score, 8), items), once)
    assert statistics.interval(score, Items(np.full(30, 1 / 30), np.zeros((30, 1), int))) == (0.0, 1.0)


def test_curves_by_slow_counting():
    draw = np.random.default_rng(3)
    similarity, same = draw.integers(0, 12, 200) / 12, draw.random(200) < 0.4  # with many ties
    above = np.array([(similarity[~same] >= s).sum() for s in similarity[same]])
    curve = details.accept_rates(above, int((~same).sum()))
    far, tar, _ = metrics.roc_curve(same, similarity, drop_intermediate=False)
    for f, found in zip(curve["far"], curve["tar"], strict=True):
        assert found == pytest.approx(max(t for g, t in zip(far, tar, strict=True) if g <= f + 1e-9))
    assert (curve["far"][-1], curve["tar"][-1]) == (1.0, 1.0)
    counted = details.accept_rates(above, int((~same).sum()), 10)
    assert min(counted["far"]) * (~same).sum() >= 10
    for f, found in zip(counted["far"], counted["tar"], strict=True):
        assert found == pytest.approx(max(t for g, t in zip(far, tar, strict=True) if g <= f + 1e-9))
    first_rank = draw.integers(1, 300, 50)
    relevant = (np.arange(50) > 3).astype(int)
    found = details.cmc({"first_rank": first_rank, "relevant": relevant, "at": np.array([1, 10, 100])})
    assert (found["rank"][0], found["rank"][-1]) == (1, 100)
    assert 10 in found["rank"]
    for k, share in zip(found["rank"], found["share"], strict=True):
        assert share == np.mean([(r <= k and n > 0) for r, n in zip(first_rank, relevant, strict=True)])


def test_what_is_shown_of_pairs_and_classes():
    draw = np.random.default_rng(5)
    label, predicted = draw.integers(0, 5, 300), draw.integers(0, 5, 300)
    arrays = {"right": label == predicted, "label": label, "predicted": predicted, "rank": 1 + (label != predicted)}
    found = Outcomes("classification", {}, "", arrays)
    values = details.of_benchmark(found, {0: "zero"}, 6)
    assert values["confusion"]["counts"] == metrics.confusion_matrix(label, predicted).tolist()
    assert values["confusion"]["classes"] == ["zero", "class 1", "class 2", "class 3", "class 4"]
    off = metrics.confusion_matrix(label, predicted) * (1 - np.eye(5, dtype=int))
    assert [c["count"] for c in values["confused"]] == sorted(off[off > 0].tolist(), reverse=True)[:8]
    assert all(label[m["image"]] != predicted[m["image"]] for m in values["mistakes"])
    assert len(values["mistakes"]) == 6
    similarity, same = draw.normal(size=50), draw.random(50) < 0.5
    pairs = draw.integers(0, 9, (50, 2))
    hardest = details.hardest({"similarity": similarity, "same": same, "first": pairs[:, 0], "second": pairs[:, 1]}, 4)
    assert [p["similarity"] for p in hardest["different"]] == sorted(similarity[~same])[::-1][:4]
    assert [p["similarity"] for p in hardest["same"]] == sorted(similarity[same])[:4]
    assert (hardest["same"][0]["first"], hardest["same"][0]["second"]) in {tuple(p) for p in pairs.tolist()}


def test_attributes_and_templates():
    """Sections of protocols that the tiny recipe has not."""
    right = np.array([[True, False], [False, True], [True, True]])
    target = np.array([[True, False], [True, False], [False, False]])
    values = details.of_benchmark(Outcomes("attributes", {}, "", {"right": right, "target": target}), {0: "hat"}, 4)
    assert values["attributes"] == [
        {"attribute": "hat", "positive": 2, "negative": 1, "right_of_positive": 0.5, "right_of_negative": 1.0},
        {"attribute": "attribute 1", "positive": 0, "negative": 3, "right_of_positive": None,
         "right_of_negative": pytest.approx(2 / 3)},
    ]  # fmt: skip
    arrays = {"impostors_above": np.array([0, 5, 40]), "impostors": np.array([1000]), "template": np.zeros((3, 2), int)}
    values = details.of_benchmark(Outcomes("templates", {}, "", arrays), {}, 4)
    assert list(values) == ["tar"]
    assert values["tar"]["far"][0] == pytest.approx(0.01)
    assert values["tar"]["tar"][0] == pytest.approx(2 / 3)


def test_shards_that_are_gone(root, tmp_path, capsys):
    """The page stands with what there is, and says what it lacks."""
    text = (root / "tiny.yaml").read_text().replace(str(root), str(tmp_path / "gone"))
    (tmp_path / "tiny.yaml").write_text(text)
    make_run(tmp_path / "whole", tmp_path / "tiny.yaml", 0)
    assert run(report.main, [str(tmp_path / "whole"), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<img" not in text
    assert text.count("No pictures") == 3
    assert "gone" in text
    capsys.readouterr()


def test_runs_on_other_data_are_not_subtracted(root, tmp_path, capsys):
    other = make_run(tmp_path / "other", root / "tiny.yaml", 2, data="e")
    assert run(report.main, [str(root / "first"), str(other), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [b["differences"] for b in values["benchmarks"].values()] == [[None]] * 3
    assert "other test items" in (tmp_path / "page.html").read_text()


def test_names_are_no_markup(root, tmp_path, capsys):
    """What comes from data is text on the page, in JSON too."""
    path = make_run(tmp_path / "<b>run", root / "tiny.yaml", 0)
    assert run(report.main, [str(path), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<b>run" not in text
    assert Page(text).json["runs"][0]["name"] == "<b>run"
    assert json.loads(page.as_json({"name": "</script><!--"})) == {"name": "</script><!--"}
    assert "<" not in page.as_json({"name": "</script><!--"})
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{root}/nowhere"], ["nowhere", "no run directory"]),
        (["{root}/first", "{root}/images"], ["images", "no run directory"]),
        (["{root}/bare"], ["no evaluation", "ufo evaluate"]),
        (["{root}/first", "--out", "{root}/no/such/page.html"], ["--out", "No such file or directory"]),
        (["{root}/first", "--out", "{root}"], ["--out", "is a directory"]),
    ],
)
def test_wrong_input(root, capsys, arguments, words):
    (root / "bare").mkdir(exist_ok=True)
    shutil.copy(root / "first" / "recipe.yaml", root / "bare")
    before = sorted(root.iterdir())
    assert run(cli._dispatch, ["report", *(a.format(root=root) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert sorted(root.iterdir()) == before


CHECK = """<script>
window.faults = [];
window.addEventListener("error", e => window.faults.push(String(e.message)), true);
window.addEventListener("load", () => {
  const images = [...document.images];
  const figures = JSON.parse(document.getElementById("figures").textContent);
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  parent.postMessage({
    faults: window.faults, images: images.length, broken: images.filter(i => !i.naturalWidth).length,
    tiny: images.filter(i => i.getBoundingClientRect().width < 20).length,
    runs: figures.runs.length, inner: window.innerWidth, wide: document.documentElement.scrollWidth,
    loaded: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).map(r => r.name),
  }, "*");
});
</script>"""
FRAMES = """<!doctype html><title></title><script>
const said = [];
window.addEventListener("message", e => { said.push(e.data); document.title = JSON.stringify(said); });
</script><iframe src="page.html" width="390" height="800"></iframe>
<iframe src="page.html" width="1280" height="800"></iframe>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_in_a_browser(made, tmp_path):
    """As wide as a phone and as a laptop: a frame each, as the window itself cannot be that narrow."""
    path, _ = made
    text = path.read_text()
    (tmp_path / "page.html").write_text(text.replace("<head>", f"<head>{CHECK}", 1))
    (tmp_path / "frames.html").write_text(FRAMES)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=20000", "--dump-dom",
         f"file://{tmp_path}/frames.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert sorted(frame["inner"] for frame in said) == [390, 1280]
    for frame in said:
        assert frame.pop("images") == len(Page(text).images) > 30
        assert frame.pop("wide") <= frame.pop("inner")
        assert frame == {"faults": [], "broken": 0, "tiny": 0, "runs": 2, "loaded": []}
    assert "CONSOLE" not in done.stderr
