"""IJB-B and IJB-C: faces come to the reference points, templates and their pairs into the index."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save
from scipy.ndimage import center_of_mass, map_coordinates

from tests.layout_files import contents, converted, fault
from ufo_ds.data.layouts.ijb import REFERENCE_52, align, read_ijb, similarity
from ufo_ds.data.shards import verify
from ufo_ds.errors import UserError


def blobs(points_52: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """An image that is brightest at five points, x and y with (0, 0) in the middle of the first pixel."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    distance = ((np.stack([x, y], -1)[None] - points_52[:, None, None]) ** 2).sum(-1)
    width = np.linalg.norm(points_52[0] - points_52[1]) / 18  # in proportion to the face
    return (255 * np.exp(-distance / (2 * width**2)).max(0)).round().astype(np.uint8)


def assert_marks_at_reference(image: np.ndarray) -> None:
    for x, y in REFERENCE_52:
        top, left = round(y) - 7, round(x) - 7
        row, column = center_of_mass(image[top : top + 15, left : left + 15].astype(float))
        assert abs(top + row - y) < 0.1
        assert abs(left + column - x) < 0.1


def moved(rng: np.random.Generator) -> np.ndarray:
    """The reference points at another place, size and angle."""
    angle, scale = rng.uniform(-0.6, 0.6), rng.uniform(0.6, 2.2)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (REFERENCE_52 - 56) @ turn.T + (150, 140)


def solved(points_52: np.ndarray) -> np.ndarray:
    """The 2 x 3 matrix of the best similarity: four unknowns, ten equations."""
    rows = [row for x, y in points_52 for row in ([x, -y, 1, 0], [y, x, 0, 1])]
    a, b, x, y = np.linalg.lstsq(np.array(rows), REFERENCE_52.ravel(), rcond=None)[0]
    return np.array([[a, -b, x], [b, a, y]])


def test_similarity_is_the_least_squares_solution() -> None:
    rng = np.random.default_rng(0)
    points_N52 = np.stack([moved(rng) + rng.normal(0, 5, (5, 2)) for _ in range(50)])
    scale_N, shift_N = similarity(points_N52)
    for points_52, scale, shift in zip(points_N52, scale_N, shift_N, strict=True):
        ours = [[scale.real, -scale.imag, shift.real], [scale.imag, scale.real, shift.imag]]
        np.testing.assert_allclose(ours, solved(points_52), rtol=1e-9, atol=1e-9)


def test_alignment_brings_points_to_the_reference() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        points_52 = moved(rng)
        crop = Image.fromarray(blobs(points_52, (280, 300))).convert("RGB")
        (scale,), (shift,) = similarity(points_52[None])
        assert_marks_at_reference(np.asarray(align(crop, scale, shift))[..., 0])


def test_alignment_equals_interpolation_at_the_inverse() -> None:
    rng = np.random.default_rng(2)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (28, 30, 3), dtype=np.uint8)).resize((300, 280)))
    for points_52 in (
        moved(rng) + rng.normal(0, 3, (5, 2)),
        REFERENCE_52 + np.array([-30, 200]),
    ):  # the second leaves the crop
        matrix = np.vstack([solved(points_52), [0, 0, 1]])
        y, x = np.mgrid[:112, :112]
        places = np.linalg.inv(matrix) @ np.stack([x.ravel(), y.ravel(), np.ones(112 * 112)])
        expected = np.stack(
            [map_coordinates(smooth[..., c].astype(float), places[1::-1], order=1) for c in range(3)], -1
        )
        (scale,), (shift,) = similarity(points_52[None])
        ours = np.asarray(align(Image.fromarray(smooth), scale, shift)).reshape(-1, 3)
        inside = ((places[:2] > 1) & (places[:2].T < (298, 278)).T).all(0)
        assert np.abs(ours - expected)[inside].max() < 1.01  # Pillow cuts off, to whole levels
        assert not ours[((places[:2] < -1) | (places[:2].T > (300, 280)).T).any(0)].any(), "outside is not black"


TEMPLATES = [(1, 11), (1, 11), (1, 12), (4, 13), (4, 11), (7, 14)]
PAIRS = [(1, 4, 1), (4, 7, 0), (7, 1, 0), (1, 1, 1)]


@pytest.fixture
def ijbc(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    folder = tmp_path / "IJBC"
    (folder / "loose_crop").mkdir(parents=True)
    (folder / "meta").mkdir()
    points = [moved(rng) for _ in TEMPLATES]
    lists: dict[str, list[str]] = {"face_tid_mid": [], "name_5pts_score": [], "template_pair_label": []}
    for n, ((template, medium), five) in enumerate(zip(TEMPLATES, points, strict=True), 1):
        Image.fromarray(blobs(five, (280, 300))).convert("RGB").save(folder / "loose_crop" / f"{n}.jpg", quality=95)
        lists["face_tid_mid"].append(f"{n}.jpg {template} {medium}")
        lists["name_5pts_score"].append(f"{n}.jpg {' '.join(f'{value:.3f}' for value in five.ravel())} 0.{n}")
    lists["template_pair_label"] = [" ".join(map(str, pair)) for pair in PAIRS]
    for name, lines in lists.items():
        (folder / "meta" / f"ijbc_{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_ijb(ijbc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard_set = converted("ijb", ijbc, tmp_path / "out")
    assert "6 samples, 3 classes, 0 cameras, 1 shard, 0 corrupt, 4 pairs, 0 dropped pairs" in capsys.readouterr().out
    for data in contents(shard_set):
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.size, image.mode) == ("PNG", (112, 112), "RGB")
        assert_marks_at_reference(np.asarray(image)[..., 0])
    assert [shard_set.classes[label] for label in shard_set.labels] == [str(template) for template, _ in TEMPLATES]
    assert shard_set.pairs is None
    found = shard_set.templates
    assert found is not None
    assert list(zip(found.template.tolist(), found.media.tolist(), strict=True)) == TEMPLATES
    np.testing.assert_array_equal(found.score, np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=np.float32))
    assert [tuple(pair) for pair in found.pairs.tolist()] == PAIRS
    assert [array.dtype for array in (found.template, found.media, found.score, found.pairs)] == [
        np.int64, np.int64, np.float32, np.int64,
    ]  # fmt: skip


def test_templates_whose_images_are_corrupt(ijbc: Path, tmp_path: Path) -> None:
    for name in ("2.jpg", "6.jpg"):
        (ijbc / "loose_crop" / name).write_bytes((ijbc / "loose_crop" / name).read_bytes()[:100])
    with pytest.raises(UserError, match=r"2.jpg is corrupt"):
        converted("ijb", ijbc, tmp_path / "none")
    shard_set = converted("ijb", ijbc, tmp_path / "out", "--max_corrupt", "0.4")
    assert shard_set.templates is not None
    assert shard_set.templates.template.tolist() == [1, 1, 4, 4]
    assert shard_set.templates.media.tolist() == [11, 12, 13, 11]
    assert shard_set.templates.pairs.tolist() == [[1, 4, 1], [1, 1, 1]]
    assert (shard_set.manifest.corrupt, shard_set.manifest.pairs, shard_set.manifest.dropped_pairs) == (2, 2, 2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("template_pairs", [[1, 9, 0]], "a template that is not there"),
        ("template_pairs", [[1, 4, 2]], "neither same nor different"),
        ("template", [1, 1], "templates are not told for 6 samples"),
        ("score", [0.1, 0.2, 0.3, 0.4, 0.5, float("nan")], "a face score is not a number"),
    ],
)
def test_verify_checks_templates(ijbc: Path, tmp_path: Path, name: str, value: list[Any], message: str) -> None:
    out = converted("ijb", ijbc, tmp_path / "out").directory
    index = load_file(out / "index.safetensors")
    index[name] = np.array(value, dtype=index[name].dtype)
    (out / "index.safetensors").write_bytes(save(index))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["index_sha256"] = hashlib.sha256(save(index)).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        verify(out)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("face_tid_mid", "2.jpg 1 11", "2.jpg 1", "face_tid_mid.txt:2: '2.jpg 1' is not an image, its template"),
        ("face_tid_mid", "2.jpg 1 11", "2.jpg 1 x", "face_tid_mid.txt:2:"),
        ("face_tid_mid", "2.jpg 1 11", "9.jpg 1 11", "score.txt:2: '2.jpg' is not the image of this line"),
        ("face_tid_mid", "6.jpg 7 14\n", "", "score.txt:6: '6.jpg' is not the image of this line"),
        ("face_tid_mid", "6.jpg 7 14", "6.jpg 7 14\n7.jpg 7 14", "has 6 images, the list of templates 7"),
        ("name_5pts_score", " 0.2\n", "\n", "score.txt:2: .* is not an image, five points and a score"),
        ("name_5pts_score", " 0.2\n", " nan\n", "score.txt:2: .* is not an image, five points and a score"),
        ("template_pair_label", "4 7 0", "4 8 0", "label.txt:2: '4 8 0' is not two templates"),
        ("template_pair_label", "4 7 0", "4 7 2", "label.txt:2: '4 7 2' is not two templates"),
        ("template_pair_label", "4 7 0", "4 7", "label.txt:2: '4 7' is not 3 numbers"),
        ("template_pair_label", "4 7 0", "4 7 0.5", "label.txt:2: '4 7 0.5' is not 3 numbers"),
    ],
)
def test_wrong_ijb(ijbc: Path, name: str, old: str, new: str, message: str) -> None:
    path = ijbc / "meta" / f"ijbc_{name}.txt"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_ijb(ijbc)


def test_incomplete_ijb(ijbc: Path) -> None:
    path = ijbc / "meta" / "ijbc_name_5pts_score.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["1.jpg" + 10 * " 50" + " 0.9", *lines[1:]]))
    with pytest.raises(UserError, match=r"1.jpg: its five points do not make a face"):
        read_ijb(ijbc)
    (ijbc / "loose_crop" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"score.txt:1: .*1.jpg does not exist"):
        read_ijb(ijbc)
    path.unlink()
    with pytest.raises(UserError, match=r"5pts_score.txt cannot be read"):
        read_ijb(ijbc)
    assert "has 0 files" in fault(read_ijb, ijbc / "loose_crop")


def test_pairs_of_templates_as_other_programs_write_them(ijbc: Path) -> None:
    """Blanks or tabs, and the line ends of either system."""
    table = np.random.default_rng(0).choice([1, 4, 7], (20_000, 3))
    table[:, 2] %= 2
    text_lines = "\r\n".join(f"{a} {b}\t{same}" for a, b, same in table.tolist())
    (ijbc / "meta" / "ijbc_template_pair_label.txt").write_text(text_lines, newline="")
    layout = read_ijb(ijbc)
    assert layout.templates is not None
    np.testing.assert_array_equal(layout.templates.pairs, table)
