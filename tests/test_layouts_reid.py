"""Lists, re-identification and product sets: trees of the original form, through the command, sample by sample."""

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import TypeAdapter

from ufo_ds import shards as command
from ufo_ds.data.evaluation_set import EvaluationSet
from ufo_ds.data.layouts import READERS
from ufo_ds.data.shards import verify
from ufo_ds.errors import UserError
from ufo_ds.recipe_benchmark import Benchmark
from ufo_ds.recipe_task import TrainSet

# What a part should hold: path below the source, label, camera.
Parts = dict[str, list[tuple[str, str, str | None]]]


def save_images(source: Path, names: list[str]) -> None:
    """A tiny JPEG for each name, no two alike."""
    for name in names:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, "JPEG")


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_market1501(source: Path) -> Parts:
    parts: Parts = {
        "train": [
            ("bounding_box_train/0002_c1s1_000451_03.jpg", "0002", "c1"),
            ("bounding_box_train/0002_c3s2_000301_01.jpg", "0002", "c3"),
            ("bounding_box_train/0007_c6s3_077367_02.jpg", "0007", "c6"),
        ],
        "query": [("query/0001_c1s1_001051_00.jpg", "0001", "c1")],
        "gallery": [
            ("bounding_box_test/-1_c1s1_000401_03.jpg", "-1", "c1"),
            ("bounding_box_test/0000_c2s1_000151_01.jpg", "0000", "c2"),
            ("bounding_box_test/0001_c2s1_000301_00.jpg", "0001", "c2"),
        ],
    }
    save_images(source, [path for part in parts.values() for path, _, _ in part])
    (source / "bounding_box_test" / "Thumbs.db").write_bytes(b"as in the original")
    write_text(source / "readme.txt", "as in the original")
    return parts


def make_duke(source: Path) -> Parts:
    parts: Parts = {
        "train": [("bounding_box_train/0001_c2_f0046182.jpg", "0001", "c2")],
        "query": [("query/0005_c2_f0046985.jpg", "0005", "c2")],
        "gallery": [
            ("bounding_box_test/0005_c5_f0051781.jpg", "0005", "c5"),
            ("bounding_box_test/7140_c8_f0010101.jpg", "7140", "c8"),
        ],
    }
    save_images(source, [path for part in parts.values() for path, _, _ in part])
    return parts


def make_msmt17(source: Path, train: str = "train", test: str = "test") -> Parts:
    lists = {
        "list_train.txt": (
            train,
            ["0001/0001_004_14_0303noon_0101_1.jpg 1", "0000/0000_000_01_0303morning_0008_0.jpg 0"],
        ),
        "list_val.txt": (train, ["0000/0000_001_02_0114afternoon_0012_2.jpg 0"]),
        "list_query.txt": (test, ["0000/0000_000_01_0303morning_0015_0.jpg 0"]),
        "list_gallery.txt": (
            test,
            ["0000/0000_003_15_0302noon_0444_0.jpg 0", "0001/0001_000_07_0113noon_0004_0.jpg 1"],
        ),
    }
    for name, (folder, rows) in lists.items():
        write_text(source / name, *rows)
        save_images(source, [f"{folder}/{row.split()[0]}" for row in rows])
    return {
        "train": [
            (f"{train}/0001/0001_004_14_0303noon_0101_1.jpg", "1", "14"),
            (f"{train}/0000/0000_000_01_0303morning_0008_0.jpg", "0", "01"),
            (f"{train}/0000/0000_001_02_0114afternoon_0012_2.jpg", "0", "02"),
        ],
        "query": [(f"{test}/0000/0000_000_01_0303morning_0015_0.jpg", "0", "01")],
        "gallery": [
            (f"{test}/0000/0000_003_15_0302noon_0444_0.jpg", "0", "15"),
            (f"{test}/0001/0001_000_07_0113noon_0004_0.jpg", "1", "07"),
        ],
    }


def make_veri776(source: Path) -> Parts:
    parts: Parts = {
        "train": [
            ("image_train/0001_c001_00016450_0.jpg", "0001", "c001"),
            ("image_train/0001_c020_00085280_1.jpg", "0001", "c020"),
        ],
        "query": [("image_query/0002_c002_00030600_0.jpg", "0002", "c002")],
        "gallery": [("image_test/0002_c003_00030615_0.jpg", "0002", "c003")],
    }
    save_images(source, [path for part in parts.values() for path, _, _ in part])
    write_text(source / "name_train.txt", "0001_c001_00016450_0.jpg")  # one less than the folder: not what counts
    return parts


def make_vehicleid(source: Path) -> Parts:
    lists = {
        "train": ["0000002 1", "0000001 1", "0000003 27"],
        "test_800": ["0120001 30", "0120002 30"],
        "test_1600": ["0120001 30", "0120002 30", "0120003 31"],
        "test_2400": ["0120003 31", "0120001 30", "0120004 32"],
        "test_3200": ["0120004 32"],
    }
    for part, rows in lists.items():
        size = part.partition("_")[2]
        write_text(source / "train_test_split" / (f"test_list_{size}.txt" if size else "train_list.txt"), *rows)
    write_text(source / "attribute" / "img2vid.txt", "0000001 1")
    parts: Parts = {
        part: [(f"image/{row.split()[0]}.jpg", row.split()[1], None) for row in rows] for part, rows in lists.items()
    }
    save_images(source, [path for part in parts.values() for path, _, _ in part])
    return parts


WILD: Parts = {
    "train": [("images/11542/119083.jpg", "11542", "23"), ("images/00007/000004.jpg", "00007", "2")],
    "query_3000": [("images/31388/321972.jpg", "31388", "61")],
    "gallery_3000": [("images/31388/321973.jpg", "31388", "9"), ("images/31389/000001.jpg", "31389", "61")],
    "query_5000": [("images/31389/000001.jpg", "31389", "61")],
    "gallery_5000": [("images/31388/321972.jpg", "31388", "61"), ("images/31388/321973.jpg", "31388", "9")],
    "query_10000": [("images/31388/321973.jpg", "31388", "9")],
    "gallery_10000": [("images/31388/321972.jpg", "31388", "61")],
}


def make_veriwild(source: Path) -> Parts:
    """Lists of names alone, cameras in vehicle_info.txt."""
    cameras = {}
    for part, rows in WILD.items():
        kind, _, size = part.partition("_")
        name = {"train": "train_list", "query": f"test_{size}_query", "gallery": f"test_{size}"}[kind]
        images = [path.removeprefix("images/").removesuffix(".jpg") for path, _, _ in rows]
        write_text(source / "train_test_split" / f"{name}.txt", *images)
        cameras |= {image: camera for image, (_, _, camera) in zip(images, rows, strict=True)}
    write_text(
        source / "train_test_split" / "vehicle_info.txt",
        "id/image;Camera ID;Time;Model;Type;Color",
        *[f"{image};{camera};2018-03-11 09:46:44;Toyota Corolla;SUV;white" for image, camera in cameras.items()],
    )
    save_images(source, [path for part in WILD.values() for path, _, _ in part])
    return WILD


def make_veriwild_with_cameras(source: Path) -> Parts:
    """Lists with a number, which starts at 0 in train, and a camera."""
    numbers = {"11542": "0", "00007": "1"}
    for part, rows in WILD.items():
        kind, _, size = part.partition("_")
        name = {"train": "train_list_start0", "query": f"test_{size}_id_query", "gallery": f"test_{size}_id"}[kind]
        write_text(
            source / "train_test_split" / f"{name}.txt",
            *[f"{path.removeprefix('images/')} {numbers.get(label, label)} {camera}" for path, label, camera in rows],
        )
    save_images(source, [path for part in WILD.values() for path, _, _ in part])
    return WILD


def make_sop(source: Path) -> Parts:
    header = "image_id class_id super_class_id path"
    write_text(
        source / "Ebay_train.txt",
        header,
        "1 1 1 bicycle_final/111085122871_0.JPG",
        "2 1 1 bicycle_final/111085122871_1.JPG",
        "3 12 3 chair_final/111265328556_0.JPG",
    )
    write_text(source / "Ebay_test.txt", header, "59552 11319 1 bicycle_final/251952414262_2.JPG")
    parts: Parts = {
        "train": [
            ("bicycle_final/111085122871_0.JPG", "1", None),
            ("bicycle_final/111085122871_1.JPG", "1", None),
            ("chair_final/111265328556_0.JPG", "12", None),
        ],
        "test": [("bicycle_final/251952414262_2.JPG", "11319", None)],
    }
    save_images(source, [path for part in parts.values() for path, _, _ in part])
    return parts


def make_inshop(source: Path, eval_folder: str = "Eval/", img_folder: str = "Img/") -> Parts:
    write_text(
        source / f"{eval_folder}list_eval_partition.txt",
        "4",
        "image_name item_id evaluation_status",
        "img/WOMEN/Dresses/id_00000002/02_1_front.jpg                  id_00000002 train  ",
        "img/MEN/Denim/id_00000080/01_1_front.jpg                      id_00000080 query  ",
        "img/WOMEN/Dresses/id_00000002/02_2_side.jpg                   id_00000002 train  ",
        "img/MEN/Denim/id_00000080/01_7_additional.jpg                 id_00000080 gallery",
    )
    women, men = f"{img_folder}img/WOMEN/Dresses/id_00000002", f"{img_folder}img/MEN/Denim/id_00000080"
    parts: Parts = {
        "train": [(f"{women}/02_1_front.jpg", "id_00000002", None), (f"{women}/02_2_side.jpg", "id_00000002", None)],
        "query": [(f"{men}/01_1_front.jpg", "id_00000080", None)],
        "gallery": [(f"{men}/01_7_additional.jpg", "id_00000080", None)],
    }
    save_images(source, [path for part in parts.values() for path, _, _ in part])
    return parts


MAKERS: dict[str, tuple[str, Callable[[Path], Parts]]] = {
    "market1501": ("market1501", make_market1501),
    "duke": ("market1501", make_duke),
    "msmt17 v1": ("market1501", make_msmt17),
    "msmt17 v2": ("market1501", lambda source: make_msmt17(source, "mask_train_v2", "mask_test_v2")),
    "veri776": ("veri776", make_veri776),
    "vehicleid": ("vehicleid", make_vehicleid),
    "veriwild": ("veriwild", make_veriwild),
    "veriwild with cameras": ("veriwild", make_veriwild_with_cameras),
    "sop": ("sop", make_sop),
    "inshop": ("inshop", make_inshop),
    "inshop flat": ("inshop", lambda source: make_inshop(source, "", "")),
}


def assert_holds(directory: Path, source: Path, samples: list[tuple[str, str, str | None]]) -> None:
    verify(directory)
    benchmark = EvaluationSet.open(directory)
    assert benchmark.label_names == [label for _, label, _ in samples]
    assert benchmark.camera_names == [camera for _, _, camera in samples]
    for index, (path, _, _) in enumerate(samples):
        assert benchmark._shards.read(index) == (source / path).read_bytes(), path


@pytest.mark.parametrize("form", MAKERS)
def test_a_set_becomes_shards(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout, make = MAKERS[form]
    source, out = tmp_path / "source", tmp_path / "out"
    parts = make(source)
    command.main([layout, str(source), str(out)])
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(" sample")[0] for line in printed] == [
        f"{out / part}: written, {len(samples)}" for part, samples in parts.items()
    ]
    assert sorted(path.name for path in out.iterdir()) == sorted(parts)
    for part, samples in parts.items():
        assert_holds(out / part, source, samples)


def test_a_list_becomes_shards(tmp_path: Path) -> None:
    save_images(tmp_path / "source", ["train/n01/a.JPEG", "b b.jpg", "train/n02/c.png", "d.jpg"])
    elsewhere = tmp_path / "source" / "d.jpg"
    (tmp_path / "source" / "train.txt").write_text(
        f"train/n02/c.png 1\n\nb b.jpg   1\r\ntrain/n01/a.JPEG\t0\n  {elsewhere} é\n", encoding="utf-8-sig"
    )
    command.main(["list", str(tmp_path / "source" / "train.txt"), str(tmp_path / "out")])
    assert_holds(
        tmp_path / "out",
        tmp_path / "source",
        [("train/n02/c.png", "1", None), ("b b.jpg", "1", None), ("train/n01/a.JPEG", "0", None), ("d.jpg", "é", None)],
    )


def test_order_of_a_folder_is_that_of_the_names(tmp_path: Path) -> None:
    parts = make_market1501(tmp_path)
    for folder in ("bounding_box_train", "bounding_box_test"):  # made anew in reverse, in whatever order it is listed
        files = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        shutil.rmtree(tmp_path / folder)
        (tmp_path / folder).mkdir()
        for name in sorted(files, reverse=True):
            (tmp_path / folder / name).write_bytes(files[name])
    read = READERS["market1501"](tmp_path)
    assert isinstance(read, dict)
    for part, samples in parts.items():
        assert [str(sample.path) for sample in read[part].samples] == [str(tmp_path / path) for path, _, _ in samples]


@pytest.mark.parametrize(
    ("form", "change", "fault"),  # change: a file or folder, and its new text; None: it goes
    [
        ("market1501", ("query", None), "source holds no query: give the directory"),
        ("market1501", ("query/0001_s1_0.jpg", ""), "query/0001_s1_0.jpg is not named <identity>_c<camera>_"),
        ("market1501", ("query/0001_c1s1_001051_00.jpg", None), "query holds no image"),
        ("msmt17 v1", ("list_val.txt", None), "source holds no list_val.txt"),
        ("msmt17 v1", ("train", None), "source holds no train or mask_train_v2"),
        ("msmt17 v2", ("list_query.txt", "a_b_01_c.jpg\n"), "query.txt:1: 'a_b_01_c.jpg' is not of the form 'path"),
        ("msmt17 v2", ("list_query.txt", "0/a_b.jpg 0\n"), "list_query.txt:1: '0/a_b.jpg' has no camera"),
        ("msmt17 v2", ("list_query.txt", "\n0/0_0_01_9.jpg 0\n"), "query.txt:2: .*test_v2/0/0_0_01_9.jpg does not"),
        ("veri776", ("image_test", None), "source holds no image_test"),
        ("veri776", ("image_test/2_3_4_0.jpg", ""), "image_test/2_3_4_0.jpg is not named"),
        ("vehicleid", ("image", None), "source holds no image"),
        ("vehicleid", ("train_test_split/test_list_1600.txt", None), "train_test_split holds no test_list_1600.txt"),
        ("vehicleid", ("train_test_split/test_list_1600.txt", ""), "test_list_1600.txt holds no image"),
        ("vehicleid", ("train_test_split/test_list_3200.txt", "1 2 3"), "3200.txt:1: '1 2 3' is not of the form 'name"),
        ("vehicleid", ("image/0000003.jpg", None), "train_list.txt:3: .*image/0000003.jpg does not exist"),
        ("veriwild", ("train_test_split/test_5000.txt", None), "holds no test_5000.txt or test_5000_id.txt"),
        ("veriwild", ("train_test_split/train_list.txt", "119083"), "list.txt:1: '119083' has no camera in .*info"),
        ("veriwild", ("train_test_split/train_list.txt", "a.jpg 0 1"), "txt:1: 'a.jpg' is not of the form vehicle/im"),
        ("veriwild", ("train_test_split/train_list.txt", "1/a.jpg 0"), "txt:1: '1/a.jpg 0' is not of the form 'vehi"),
        ("veriwild", ("train_test_split/vehicle_info.txt", None), "'11542/119083' has no camera in .*vehicle_info.txt"),
        ("veriwild", ("train_test_split/vehicle_info.txt", "1/2;;x"), "txt:1: '1/2;;x' is not of the form 'vehicle/"),
        ("veriwild", ("images/31388/321972.jpg", None), "query.txt:1: .*images/31388/321972.jpg does not exist"),
        ("sop", ("Ebay_test.txt", None), "source holds no Ebay_test.txt"),
        ("sop", ("Ebay_test.txt", ""), "Ebay_test.txt:1: header '' is not 'image_id class_id"),
        ("sop", ("Ebay_test.txt", "1 1 1 a.JPG\n"), "Ebay_test.txt:1: header '1 1 1 a.JPG' is not 'image_id class_id"),
        ("sop", ("chair_final", None), "Ebay_train.txt:4: .*chair_final/111265328556_0.JPG does not exist"),
        ("inshop", ("Img", None), "source holds no Img/img or img"),
        ("inshop", ("Eval", None), "source holds no Eval/list_eval_partition.txt or list_eval_partition.txt"),
        ("inshop", ("Eval/list_eval_partition.txt", "0\n"), "partition.txt:2: header '' is not 'image_name"),
        ("inshop", ("Img/img/MEN/Denim/id_00000080/01_1_front.jpg", None), "txt:4: .*01_1_front.jpg does not exist"),
    ],
)  # fmt: skip
def test_wrong_set(form: str, change: tuple[str, str | None], fault: str, tmp_path: Path) -> None:
    layout, make = MAKERS[form]
    source = tmp_path / "source"
    make(source)
    path, text = source / change[0], change[1]
    if text is not None:
        path.write_text(text)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert_refused([layout, str(source), str(tmp_path / "out")], fault)


@pytest.mark.parametrize(
    ("replace", "by", "fault"),
    [
        ("4\n", "5\n", "partition.txt:1: '5' is not the number of images listed below, 4"),
        ("query  ", "val", "partition.txt:4: evaluation_status 'val' is not one of train, query, gallery"),
        (" query  ", "", "partition.txt:4: 'img/MEN.* is not of the form 'image_name item_id evaluation_status'"),
        ("gallery", "query", "partition.txt holds no image"),
    ],
)
def test_wrong_partition(replace: str, by: str, fault: str, tmp_path: Path) -> None:
    make_inshop(tmp_path / "source")
    path = tmp_path / "source" / "Eval" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace(replace, by, 1))
    assert_refused(["inshop", str(tmp_path / "source"), str(tmp_path / "out")], fault)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "train.txt holds no image"),
        ("a.jpg 0\na.jpg\n", "train.txt:2: 'a.jpg' has no label"),
        ("a.jpg 0\na.jpg,0\n", "train.txt:2: 'a.jpg,0' has no label"),
        ("a b.jpg\n", "train.txt:1: 'a' is not an image: its name must end in jpg"),
        ("x/a.jpg 0\n", "train.txt:1: .*x/a.jpg does not exist"),
        ("a.jpg/a.jpg 0\n", "train.txt:1: .*a.jpg/a.jpg does not exist"),
        ("a.jpg \udcff\n", "train.txt is not text in UTF-8"),
        (None, r"train.txt cannot be read \(No such file"),
    ],
)
def test_wrong_list(text: str | None, fault: str, tmp_path: Path) -> None:
    save_images(tmp_path, ["a.jpg"])
    if text is not None:
        (tmp_path / "train.txt").write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(["list", str(tmp_path / "train.txt"), str(tmp_path / "out")], fault)


@pytest.mark.parametrize("layout", ["market1501", "veri776", "vehicleid", "veriwild", "sop", "inshop", "list"])
def test_source_that_is_not_there_or_of_another_kind(layout: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a.jpg 0\n")
    kinds = ["nowhere", "."] if layout == "list" else ["nowhere", "file"]
    for kind in kinds:
        assert_refused([layout, str(tmp_path / kind), str(tmp_path / "out")], "holds no|cannot be read")


def assert_refused(arguments: list[str], fault: str) -> None:
    """With one line, and nothing is written."""
    with pytest.raises(UserError, match=fault) as error:
        command.main(arguments)
    assert "\n" not in str(error.value)
    assert not Path(arguments[-1]).exists()


def test_the_page_has_every_layout_and_recipes_that_are_valid() -> None:
    page = (Path(__file__).parents[1] / "docs" / "bring_your_own_data.md").read_text()
    sections = {section.partition("\n")[0]: section for section in page.split("\n## ")[1:]}
    for layout in {"folder", "csv", "list", *(layout for layout, _ in MAKERS.values())}:
        assert f"$ ufo shards {layout} " in sections[layout]
        task = yaml.safe_load(sections[layout].partition("```yaml\n")[2].partition("```")[0])
        TypeAdapter(list[TrainSet]).validate_python(task.pop("train"))
        TypeAdapter(list[Benchmark]).validate_python(task.pop("benchmarks", []))
        assert not task
