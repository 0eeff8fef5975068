"""IJB-B and IJB-C as insightface distributes them: loosely cropped faces, their five points, and sets of them."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ufo_ds.data.layouts import files
from ufo_ds.data.layouts.layout import Layout, Sample, Templates
from ufo_ds.data.transforms import CorruptImage, decode
from ufo_ds.errors import UserError

SIZE = 112  # pixels, of the aligned face
# Where eyes, nose and corners of the mouth are in a face of 112 x 112, as x and y with (0, 0) in the middle of the
# first pixel: the points to which the faces of MS1M and of ArcFace's evaluations are aligned (Deng et al., 2019).
REFERENCE_52 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


@dataclass(frozen=True, slots=True)
class AlignedFace:
    """A face aligned while it is read.

    Attributes:
        file: the loose crop.
        scale, shift: of :func:`similarity`, from the crop's points to the aligned ones.
    """

    file: Path
    scale: complex
    shift: complex
    suffix = ".png"

    def read_bytes(self) -> bytes:
        """A PNG of 112 x 112; a crop that cannot be decoded as it is, to be found corrupt by who decodes it."""
        data = self.file.read_bytes()
        try:
            crop = decode(data)
        except CorruptImage:
            return data
        out = io.BytesIO()
        align(crop, self.scale, self.shift).save(out, "PNG")
        return out.getvalue()

    def __str__(self) -> str:
        return str(self.file)


def read_ijb(source: Path) -> Layout:
    """A directory of IJB-B or IJB-C as insightface distributes them, with loose_crop and meta.

    Of meta it reads ijbc_face_tid_mid.txt, ijbc_name_5pts_score.txt and ijbc_template_pair_label.txt (or ijbb_...).
    Each face is aligned to 112 x 112 by its five points and kept as PNG, without loss; what the points leave outside
    of the crop is black. The label is the number of the template, since no identity is told; templates, media, face
    scores and pairs of templates come into the index. Protocol: Whitelam et al. 2017 and Maze et al. 2018, 1:1;
    files and alignment: eval_ijbc.py of insightface's arcface_torch.

    Raises:
        UserError: with file and line, for a missing file or image, lists that differ, or five points that do not
            make a face.
    """
    source = Path(source)
    found = sorted(source.glob("meta/ijb?_face_tid_mid.txt"))
    if len(found) != 1:
        raise UserError(
            f"{source} has {len(found)} files meta/ijb?_face_tid_mid.txt: give the folder of IJB-B or IJB-C"
        )
    prefix = found[0].name.removesuffix("_face_tid_mid.txt")
    template, media, names = _read_templates(found[0])
    points_N52, score, images = _read_points(source / "meta" / f"{prefix}_name_5pts_score.txt", names, source)
    pairs_file = source / "meta" / f"{prefix}_template_pair_label.txt"
    pairs = files.read_integers(pairs_file, columns=3)
    wrong = np.flatnonzero(~np.isin(pairs[:, :2], template).all(axis=1) | (pairs[:, 2] > 1))
    if wrong.size:
        row = " ".join(map(str, pairs[wrong[0]]))
        raise UserError(
            f"{pairs_file}:{wrong[0] + 1}: {row!r} is not two templates of {found[0].name} and 0 or 1: copy it"
        )
    scale, shift = similarity(points_N52)
    bad = np.flatnonzero(~np.isfinite(scale + shift) | (scale == 0))
    if bad.size:
        raise UserError(f"{images[bad[0]]}: its five points do not make a face: correct or remove its lines in meta")
    faces = [AlignedFace(*values) for values in zip(images, scale.tolist(), shift.tolist(), strict=True)]
    labels = [str(number) for number in template.tolist()]
    samples = [Sample(face, label) for face, label in zip(faces, labels, strict=True)]
    return Layout(samples, templates=Templates(template, media, score, pairs))


def similarity(points_N52: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rotation, scaling and shift that bring five points closest to the reference points.

    By least squares, as Umeyama (1991), whose solution in the plane is this one of numbers x + iy: no reflection can
    come about there.

    Returns:
        scale and shift, complex128 [N] each: ``scale * (x + iy) + shift`` is where a point comes to; not finite for
        points that are all the same.
    """
    points_N5 = points_N52[..., 0] + 1j * points_N52[..., 1]
    reference_5 = REFERENCE_52[:, 0] + 1j * REFERENCE_52[:, 1]
    centre_N = points_N5.mean(axis=1)
    centred_N5 = points_N5 - centre_N[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        covariance_N = (centred_N5.conj() * (reference_5 - reference_5.mean())).sum(axis=1)
        scale_N = covariance_N / (np.abs(centred_N5) ** 2).sum(axis=1)
        return scale_N, reference_5.mean() - scale_N * centre_N


def align(crop: Image.Image, scale: complex, shift: complex) -> Image.Image:
    """Bring a face to 112 x 112, bilinear and without antialiasing, as OpenCV's ``warpAffine`` does."""
    back = 1 / scale
    # Pillow has (0, 0) at the corner of the first pixel, the points have it in its middle.
    start = back * (-0.5 - 0.5j - shift) + 0.5 + 0.5j
    matrix = (back.real, -back.imag, start.real, back.imag, back.real, start.imag)
    return crop.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(0, 0, 0))


def _read_templates(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Template and media, int64 [N] each, and the images' names."""
    names, numbers = [], []
    for where, row in files.rows(path):
        if len(row) != 3 or not files.are_numbers(row[1:]):
            raise UserError(
                f"{where}: {' '.join(row)!r} is not an image, its template and its medium: copy the file again"
            )
        names.append(row[0])
        numbers.append((int(row[1]), int(row[2])))
    if not names:
        raise UserError(f"{path} is empty: copy it again")
    table = np.array(numbers, dtype=np.int64)
    return table[:, 0].copy(), table[:, 1].copy(), names


def _read_points(path: Path, names: list[str], source: Path) -> tuple[np.ndarray, np.ndarray, list[Path]]:
    """Points [N, 5, 2], scores float32 [N], and the images, which are those of ``names`` in their order."""
    values: list[list[float]] = []
    images = []
    for where, row in files.rows(path):
        try:
            numbers = [float(value) for value in row[1:]]
        except ValueError:
            numbers = []
        if len(numbers) != 11 or not np.isfinite(numbers).all():
            raise UserError(f"{where}: {' '.join(row)!r} is not an image, five points and a score: copy the file again")
        if len(values) == len(names) or row[0] != names[len(values)]:
            raise UserError(
                f"{where}: {row[0]!r} is not the image of this line in the list of templates: copy both again"
            )
        image = source / "loose_crop" / row[0]
        if not image.is_file():
            raise UserError(f"{where}: {image} does not exist: unpack all images")
        values.append(numbers)
        images.append(image)
    if len(values) < len(names):
        raise UserError(f"{path} has {len(values)} images, the list of templates {len(names)}: copy both again")
    table = np.array(values)
    return table[:, :10].reshape(-1, 5, 2), table[:, 10].astype(np.float32), images
