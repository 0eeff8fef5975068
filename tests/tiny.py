"""A recipe small enough for tests that start real trainings, and its shards."""

from pathlib import Path

import numpy as np
from PIL import Image

from ufo_ds.data.layouts import read_csv, read_folder
from ufo_ds.data.shard_writer import write

RECIPE = """
name: tiny
model:
  backbone: {{dim: 16, depth: 2, heads: 2, patch_size: 4, mlp_ratio: 2}}
  experts: [embed, ffn]
  routes: {{embed: own, ffn: learned}}
  router: {{freeze_at: 5}}
  drop_path: 0.1
tasks:
  - name: colours
    head: {{type: linear}}
    loss: {{cross_entropy: {{label_smoothing: 0.1}}}}
    input: [8, 8]
    samples_per_step: 8
    train: [{{shards: {root}/colours}}]
    benchmarks: [{{name: colours, protocol: classification, shards: {root}/colours}}]
  - name: stripes
    head: {{type: margin}}
    loss: {{cosface: {{scale: 8, margin: 0.1}}, triplet: {{margin: soft}}}}
    input: [8, 12]
    samples_per_step: 8
    identities_per_step: 4
    augment: {{pad: 1, flip: true, erasing: 0.5}}
    train: [{{shards: {root}/stripes}}]
    benchmarks:
      - {{name: stripes, protocol: retrieval, query: {root}/stripes, gallery: {root}/stripes}}
      - {{name: stripe_pairs, protocol: verification, shards: {root}/pairs}}
optimizer: {{type: adamw, lr: 0.001, gradient_clipping: 1.0, average: 0.6}}
schedule: {{steps: 12, warmup_steps: 2}}
evaluation: {{every: 6, best: colours/colours/top1, batch_size: 16}}
checkpoint: {{every: 4, keep: 2}}
logging: {{every: 1, tensorboard: false}}
data: {{workers: 0}}
"""


def make(root: Path) -> Path:
    """Write shards of noisy colours (3 classes) and noisy stripes (6 identities, 2 cameras); the recipe's file."""
    random = np.random.default_rng(0)
    images = root / "images"
    for label in range(3):
        (images / "colours" / f"colour{label}").mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(0, 60, (9, 9, 3)) + np.eye(3, dtype=int)[label] * 150
            Image.fromarray(pixels.astype(np.uint8)).save(images / "colours" / f"colour{label}" / f"{i}.png")
    rows, files = ["path,id,camera"], []
    (images / "stripes").mkdir()
    for identity in range(6):
        for i in range(6):
            wave = 100 + 80 * np.sin(np.arange(13) * (0.4 + 0.4 * identity) + random.uniform(0, 0.5))
            pixels = np.clip(wave[None, :, None] + random.integers(0, 50, (9, 13, 3)), 0, 255)
            name = f"stripes/{identity}_{i}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(images / name)
            rows.append(f"{name},id{identity},cam{i % 2}")
            files.append((identity, name))
    (images / "stripes.csv").write_text("\n".join(rows) + "\n")
    pairs = ["fold,path1,path2,same"]
    for n in range(20):
        first, second = random.choice(len(files), 2, replace=False)
        if n % 2:
            second = (first // 6) * 6 + (first + 1) % 6
        pairs.append(f"{n % 2},{files[first][1]},{files[second][1]},{int(files[first][0] == files[second][0])}")
    (images / "pairs.csv").write_text("\n".join(pairs) + "\n")
    write(read_folder(images / "colours"), root / "colours", source="test", licence="none")
    write(read_csv(images / "stripes.csv"), root / "stripes", source="test", licence="none")
    write(read_csv(images / "pairs.csv"), root / "pairs", source="test", licence="none")
    (root / "tiny.yaml").write_text(RECIPE.format(root=root))
    return root / "tiny.yaml"
