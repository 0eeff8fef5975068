"""Layouts of person and vehicle re-identification: identity and camera are in the file names or in lists."""

import re
from pathlib import Path

from ufo_ds.data.layouts.files import Images, file_names, find, lines, listed, values
from ufo_ds.data.layouts.layout import Layout, Sample, is_image
from ufo_ds.errors import UserError

NAME = re.compile(r"(-1|\d+)_(c\d+)(s\d+)?_")  # the sequence (s) is Market-1501's alone


def read_market1501(source: Path) -> dict[str, Layout]:
    """The directory of Market-1501, of DukeMTMC-reID or of MSMT17.

    Market-1501 (Zheng et al., 2015) and DukeMTMC-reID (Zheng et al., 2017) hold bounding_box_train, query and
    bounding_box_test, with images such as 0002_c1s1_000451_03.jpg and 0001_c2_f0046182.jpg: identity, camera. In the
    gallery of Market-1501, -1 is junk, which the evaluation leaves out, and 0000 are distractors; both are kept, with
    these labels. The order is that of the names.

    MSMT17 (Wei et al., 2018) holds list_train.txt, list_val.txt, list_query.txt and list_gallery.txt, with lines such
    as "0000/0000_000_01_0303morning_0008_0.jpg 0": path, identity; the camera is the third field of the name. The
    images are in train and test (V1) or in mask_train_v2 and mask_test_v2 (V2). The official training set is
    list_train.txt and list_val.txt together. The order is that of the lists.

    Parts: train, query, gallery.

    Raises:
        UserError: a missing folder or list, a name or line of another form, a listed image that is not there.
    """
    source = Path(source)
    if (source / "list_train.txt").exists():
        return _read_msmt17(source)
    folders = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    return {part: _read_named(find(source, folder)) for part, folder in folders.items()}


def read_veri776(source: Path) -> dict[str, Layout]:
    """The directory of VeRi-776.

    VeRi-776 (Liu et al., 2016, ECCV) holds image_train, image_query and image_test, with images such as
    0001_c001_00016450_0.jpg: vehicle, camera. What is in the folders counts, not name_train.txt and its like. The
    order is that of the names.

    Parts: train, query, gallery.

    Raises:
        UserError: a missing folder, or a name of another form.
    """
    source = Path(source)
    folders = {"train": "image_train", "query": "image_query", "gallery": "image_test"}
    return {part: _read_named(find(source, folder)) for part, folder in folders.items()}


def read_vehicleid(source: Path) -> dict[str, Layout]:
    """The directory of PKU VehicleID.

    VehicleID (Liu et al., 2016, CVPR) holds the folder image and, in train_test_split, train_list.txt and
    test_list_800.txt, test_list_1600.txt and test_list_2400.txt, with lines "name vehicle"; the image is name.jpg.
    There are no cameras. The order is that of the lists.

    Parts: train, test_800, test_1600, test_2400; and test_3200, test_6000, test_13164 if their lists are there.

    Raises:
        UserError: a missing folder or list, a line of another form, a listed image that is not there.
    """
    source = Path(source)
    folder, lists = find(source, "image"), find(source, "train_test_split")
    images = Images()
    parts = {"train": find(lists, "train_list.txt")}
    parts |= {f"test_{size}": find(lists, f"test_list_{size}.txt") for size in (800, 1600, 2400)}
    more = {f"test_{size}": lists / f"test_list_{size}.txt" for size in (3200, 6000, 13164)}
    parts |= {part: path for part, path in more.items() if path.exists()}

    def read(path: Path) -> Layout:
        samples = []
        for where, text in lines(path):
            name, vehicle = values(where, text, "name vehicle")
            samples.append(Sample(images.path(where, folder, f"{name}.jpg"), vehicle))
        return listed(path, samples)

    return {part: read(path) for part, path in parts.items()}


def read_veriwild(source: Path) -> dict[str, Layout]:
    """The directory of VERI-Wild.

    VERI-Wild (Lou et al., 2019) holds images/<vehicle>/<image>.jpg and lists in train_test_split. They come in two
    forms, which are told apart line by line: train_list.txt, test_3000.txt, test_3000_query.txt and so on with lines
    "vehicle/image", the camera then being in vehicle_info.txt ("vehicle/image;camera;..."); and train_list_start0.txt,
    test_3000_id.txt, test_3000_id_query.txt and so on with lines "vehicle/image.jpg number camera". The identity is
    the vehicle's folder: the number starts at 0 in train. The order is that of the lists.

    Parts: train, query_3000, gallery_3000, and the same for 5000 and 10000.

    Raises:
        UserError: a missing folder or list, a line of another form, a listed image that is not there or has no camera.
    """
    source = Path(source)
    folder, lists = find(source, "images"), find(source, "train_test_split")
    parts = {"train": find(lists, "train_list.txt", "train_list_start0.txt")}
    for size in (3000, 5000, 10000):
        parts[f"query_{size}"] = find(lists, f"test_{size}_query.txt", f"test_{size}_id_query.txt")
        parts[f"gallery_{size}"] = find(lists, f"test_{size}.txt", f"test_{size}_id.txt")
    info = lists / "vehicle_info.txt"
    if not info.exists():
        info = source / "vehicle_info.txt"
    camera_of = _vehicle_cameras(info) if info.exists() else {}
    images = Images()

    def read(path: Path) -> Layout:
        samples = []
        for where, text in lines(path):
            if len(text.split()) == 1:
                name = text
                camera = camera_of.get(name.removesuffix(".jpg"))
                if camera is None:
                    raise UserError(f"{where}: {name!r} has no camera in {info}: add it there, or to the line")
            else:
                name, _, camera = values(where, text, "vehicle/image number camera")
            vehicle, slash, _ = name.partition("/")
            if not slash:
                raise UserError(f"{where}: {name!r} is not of the form vehicle/image: correct the line")
            image = images.path(where, folder, f"{name.removesuffix('.jpg')}.jpg")
            samples.append(Sample(image, vehicle, camera))
        return listed(path, samples)

    return {part: read(path) for part, path in parts.items()}


def _read_named(folder: Path) -> Layout:
    samples = []
    for name in file_names(folder):
        path = folder / name
        if not is_image(path):
            continue
        match = NAME.match(name)
        if match is None:
            raise UserError(
                f"{path} is not named <identity>_c<camera>_..., such as 0002_c1s1_000451_03.jpg: rename or remove it"
            )
        samples.append(Sample(path, match[1], match[2]))
    return listed(folder, samples)


def _read_msmt17(source: Path) -> dict[str, Layout]:
    train, test = find(source, "train", "mask_train_v2"), find(source, "test", "mask_test_v2")
    images = Images()

    def read(folder: Path, name: str) -> list[Sample]:
        path = find(source, name)
        samples = []
        for where, text in lines(path):
            image, identity = values(where, text, "path identity")
            fields = image.rpartition("/")[2].split("_")
            if len(fields) < 4 or not fields[2].isdigit():
                raise UserError(
                    f"{where}: {image!r} has no camera as the third field of its name, as in "
                    f"0000_000_01_0303morning_0008_0.jpg: correct the line"
                )
            samples.append(Sample(images.path(where, folder, image), identity, fields[2]))
        return listed(path, samples).samples

    return {
        "train": Layout(read(train, "list_train.txt") + read(train, "list_val.txt")),
        "query": Layout(read(test, "list_query.txt")),
        "gallery": Layout(read(test, "list_gallery.txt")),
    }


def _vehicle_cameras(info: Path) -> dict[str, str]:
    """The camera of each ``vehicle/image``."""
    camera_of = {}
    for where, text in lines(info):
        name, _, rest = text.partition(";")
        camera = rest.partition(";")[0].strip()
        if name == "id/image":  # the header, which not every release has
            continue
        if "/" not in name or not camera:
            raise UserError(f"{where}: {text!r} is not of the form 'vehicle/image;camera;...': correct the line")
        camera_of[name] = camera
    return camera_of
