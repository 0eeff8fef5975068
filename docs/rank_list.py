"""Draw a rank list of the demo's extracted glyph model: queries, and what it finds in the gallery.

    python docs/rank_list.py runs/demo/glyphs data_shards/demo/glyphs docs/rank_list.png

Uses nothing of ufo_ds but the shards: the model is a plain transformers ViT.
"""

import io
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from ufo_ds.data.shards import ShardSet

matplotlib.use("Agg")
ROWS, COLUMNS = 5, 10
RIGHT, WRONG = "#1a7f37", "#cf222e"


def main(model_path: str, shards_path: str, out: str) -> None:
    processor, model = AutoImageProcessor.from_pretrained(model_path), AutoModel.from_pretrained(model_path).eval()
    sets = [ShardSet.open(Path(shards_path) / name) for name in ("query", "gallery")]

    def load(shards: ShardSet) -> tuple[list[Image.Image], torch.Tensor]:
        images = [Image.open(io.BytesIO(shards.read(i))) for i in range(len(shards))]
        with torch.no_grad():
            pixels = processor(images=images, return_tensors="pt").pixel_values
            return images, torch.nn.functional.normalize(model(pixels).pooler_output)

    (queries, query_features), (gallery, gallery_features) = load(sets[0]), load(sets[1])
    names = [[shards.classes[label] for label in shards.labels] for shards in sets]
    cameras = [[shards.cameras[camera] for camera in shards.camera_ids] for shards in sets]
    figure, axes = plt.subplots(ROWS, COLUMNS + 1, figsize=(COLUMNS + 1, ROWS * 1.02), dpi=80)
    for row, query in zip(axes, range(7, len(queries), len(queries) // ROWS), strict=False):
        ranked = (gallery_features @ query_features[query]).argsort(descending=True).tolist()
        same_font = [names[1][i] == names[0][query] and cameras[1][i] == cameras[0][query] for i in ranked]
        found = [i for i, skip in zip(ranked, same_font, strict=True) if not skip][:COLUMNS]
        for axis, image, colour in zip(
            row,
            [queries[query], *(gallery[i] for i in found)],
            ["#57606a", *(RIGHT if names[1][i] == names[0][query] else WRONG for i in found)],
            strict=True,
        ):
            axis.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=3)
    axes[0, 0].set_title("query", fontsize=10)
    for rank in range(1, COLUMNS + 1):
        axes[0, rank].set_title(str(rank), fontsize=10)
    figure.tight_layout(pad=0.4)
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
