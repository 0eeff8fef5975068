"""The forms in which public data sets come, each read into the parts that its benchmark has."""

from collections.abc import Callable
from pathlib import Path

from ufo_ds.data.layouts.faces import read_facebin, read_pairs
from ufo_ds.data.layouts.generic import read_csv, read_folder, read_list
from ufo_ds.data.layouts.ijb import read_ijb
from ufo_ds.data.layouts.layout import IMAGE_EXTENSIONS, ImageFile, Layout, Pair, Sample, Templates, is_image
from ufo_ds.data.layouts.products import read_inshop, read_sop
from ufo_ds.data.layouts.recordio import read_recordio
from ufo_ds.data.layouts.reid import read_market1501, read_vehicleid, read_veri776, read_veriwild

__all__ = [
    "IMAGE_EXTENSIONS",
    "READERS",
    "ImageFile",
    "Layout",
    "Pair",
    "Sample",
    "Templates",
    "is_image",
    "read_csv",
    "read_folder",
]

# By the name that `ufo shards` takes: from a source to its parts by name, such as train, query and gallery; a layout
# that has no parts gives a Layout. The first line of a reader's docstring says what the source is.
READERS: dict[str, Callable[[Path], Layout | dict[str, Layout]]] = {
    "folder": read_folder,
    "csv": read_csv,
    "list": read_list,
    "market1501": read_market1501,
    "veri776": read_veri776,
    "vehicleid": read_vehicleid,
    "veriwild": read_veriwild,
    "sop": read_sop,
    "inshop": read_inshop,
    "pairs": read_pairs,
    "facebin": read_facebin,
    "recordio": read_recordio,
    "ijb": read_ijb,
}
