"""Layouts of product retrieval."""

from pathlib import Path

from ufo_ds.data.layouts.files import Images, find, lines, listed, values
from ufo_ds.data.layouts.layout import Layout, Sample
from ufo_ds.errors import UserError

SOP_HEADER = "image_id class_id super_class_id path"
INSHOP_HEADER = "image_name item_id evaluation_status"


def read_sop(source: Path) -> dict[str, Layout]:
    """The directory of Stanford Online Products.

    Stanford Online Products (Song et al., 2016) holds Ebay_train.txt and Ebay_test.txt, with the header
    "image_id class_id super_class_id path" and paths such as bicycle_final/111085122871_0.JPG. The label is class_id,
    the product. The order is that of the lists.

    Parts: train, test; in the benchmark each test image is a query against all others.

    Raises:
        UserError: a missing list, a line of another form, a listed image that is not there.
    """
    source = Path(source)
    images = Images()

    def read(name: str) -> Layout:
        path = find(source, name)
        rows = lines(path)
        where, header = next(rows, (f"{path}:1", ""))
        if header.split() != SOP_HEADER.split():
            raise UserError(f"{where}: header {header!r} is not {SOP_HEADER!r}: get the list again")
        samples = []
        for where, text in rows:
            _, product, _, image = values(where, text, SOP_HEADER)
            samples.append(Sample(images.path(where, source, image), product))
        return listed(path, samples)

    return {"train": read("Ebay_train.txt"), "test": read("Ebay_test.txt")}


def read_inshop(source: Path) -> dict[str, Layout]:
    """The directory of DeepFashion In-shop Clothes Retrieval.

    DeepFashion In-shop (Liu et al., 2016) holds Eval/list_eval_partition.txt (or the list itself): the number of
    images, the header "image_name item_id evaluation_status", then lines such as
    "img/WOMEN/Dresses/id_00000002/02_1_front.jpg id_00000002 train". The images are in Img/img or in img. The label is
    item_id, the order that of the list.

    Parts: train, query, gallery.

    Raises:
        UserError: a missing folder or list, another number of lines than it says, a line of another form, a listed
            image that is not there.
    """
    source = Path(source)
    path = find(source, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
    root = find(source, "Img/img", "img").parent
    images = Images()
    samples: dict[str, list[Sample]] = {"train": [], "query": [], "gallery": []}
    rows = lines(path)
    first, count = next(rows, (f"{path}:1", ""))
    where, header = next(rows, (f"{path}:2", ""))
    if header.split() != INSHOP_HEADER.split():
        raise UserError(f"{where}: header {header!r} is not {INSHOP_HEADER!r}: get the list again")
    for where, text in rows:
        image, item, status = values(where, text, INSHOP_HEADER)
        if status not in samples:
            raise UserError(
                f"{where}: evaluation_status {status!r} is not one of {', '.join(samples)}: correct the line"
            )
        samples[status].append(Sample(images.path(where, root, image), item))
    total = sum(map(len, samples.values()))
    if count != str(total):
        raise UserError(f"{first}: {count!r} is not the number of images listed below, {total}: get the list again")
    return {status: listed(path, part) for status, part in samples.items()}
