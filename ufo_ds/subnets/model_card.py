"""What the directory of an extracted model says of it to people and to the hub."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ufo_ds.checkpoint import Reader
from ufo_ds.model.architecture import Architecture
from ufo_ds.model.dense import is_stock
from ufo_ds.model.hub import UfoViTConfig
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.subnets.licences import UNKNOWN, behind

HUB = "ufo_ds.model.hub"  # what is not stock loads only with it
CARD = "README.md"
LICENCES = "| images behind these weights, by task | licence |\n|---|---|\n"


def model_card(reader: Reader, spec: SubnetSpec, parameters: int, recalibrated: bool) -> str:
    """A model card, with the front matter that the hub reads.

    Args:
        parameters: their number.
        recalibrated: whether the statistics of its neck were found for it.
    """
    task = next(t for t in reader.recipe.tasks if t.name == spec.task)
    metrics = {k: v for k, v in reader.index.metrics.items() if k.startswith(f"{task.name}/")}
    linear = task.head.type == "linear"
    use = (
        "AutoModelForImageClassification.from_pretrained(path)(**inputs).logits"
        f"{'.sigmoid()  # of each attribute' if task.loss.multi_label else ''}" if linear
        else "AutoModel.from_pretrained(path)(**inputs).pooler_output  # compare by cosine"
    )  # fmt: skip
    stock = is_stock(reader.recipe.model.backbone, spec.architecture)
    register = "" if stock else f"import {HUB}  # registers the model's class with transformers\n"
    needs = "" if stock else f"""
The model has what transformers' ViT lacks, blocks of several sizes, a convolutional stem or mean pooling, so its class
comes with the package `ufo_ds`. Without `import {HUB}`, transformers does not know the model type
`{UfoViTConfig.model_type}`.
"""  # fmt: skip
    routes = asdict(spec)["routes"]
    sizes = "\n".join(f"| {name} | {value} |" for name, value in _sizes(spec))
    found = "" if not recalibrated else """
The running statistics of its neck were found anew from training images, as those of the supernet are of another subnet.
"""  # fmt: skip
    is_whole = spec.architecture == Architecture.of(reader.recipe.model.backbone)
    measured = "the supernet" if is_whole else "the whole path, of which this is a part,"
    rows = "\n".join(f"| {unit} | {' '.join(layers)} |" for unit, layers in routes.items())
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items()) or "| none recorded | |"
    licences = _licences(reader, [spec])
    started = "" if reader.recipe.model.init is None else f"\nTraining started from `{reader.recipe.model.init}`.\n"
    return f"""---
library_name: transformers
pipeline_tag: {"image-classification" if linear else "image-feature-extraction"}
---

# {task.name}

The dense model of the task `{task.name}`, cut out of the multi-task supernet `{reader.recipe.name}` (step
{reader.index.step}) with ufo_ds: {parameters / 1e6:.2f} M parameters, input {task.input[0]}x{task.input[1]}.
{found}
```python
from PIL import Image
from transformers import AutoImageProcessor, {"AutoModelForImageClassification" if linear else "AutoModel"}
{register}
inputs = AutoImageProcessor.from_pretrained(path)(Image.open(file), return_tensors="pt")
{use}
```
{needs}
| subnet | `{spec.name}` |
|---|---|
{sizes}

| metric of {measured} at that step | |
|---|---|
{scores}

| unit | copy, by layer |
|---|---|
{rows}

{LICENCES}{licences}
{started}"""


def _sizes(spec: SubnetSpec) -> Iterator[tuple[str, object]]:
    kept = spec.architecture
    yield "blocks", kept.depth
    yield "width of the tokens", kept.dim
    if kept.stem:
        yield "channels of the stem, by layer", " ".join(map(str, kept.stem))
    yield "heads, by block", " ".join(map(str, kept.heads))
    yield "width of the FFN, by block", " ".join(map(str, kept.hidden))


def joint_card(reader: Reader, specs: list[SubnetSpec], parameters: int) -> str:
    """Of several tasks' subnets in one directory."""
    rows = "\n".join(
        f"| {spec.task} | `{spec.name}` | {'; '.join(f'{name}: {value}' for name, value in _sizes(spec))} |"
        for spec in specs
    )
    started = "" if reader.recipe.model.init is None else f"\nTraining started from `{reader.recipe.model.init}`.\n"
    names = ", ".join(f"`{spec.task}`" for spec in specs)
    return f"""# {", ".join(spec.task for spec in specs)}

Models of the tasks {names}, cut out of the multi-task supernet `{reader.recipe.name}` (step {reader.index.step}) with
ufo_ds: {parameters / 1e6:.2f} M parameters, of which those that the tasks share are there once.

```sh
ufo evaluate PATH
ufo predict PATH IMAGE --task {specs[0].task}
ufo extract PATH --task {specs[0].task} --out {specs[0].task}-vit    # one alone, for transformers
```

| task | subnet | sizes |
|---|---|---|
{rows}

{LICENCES}{_licences(reader, specs)}
{started}"""


def _licences(reader: Reader, specs: list[SubnetSpec]) -> str:
    found = {name: of for spec in specs for name, of in behind(reader.index, reader.recipe, spec).items()}
    return licence_rows(found)


def licences_on_card(card: Path, task: str) -> dict[str, list[str]]:
    """Of the images behind a model's weights, by task, as its card says it."""
    try:
        _, _, rest = card.read_text().partition(LICENCES)
    except (OSError, UnicodeDecodeError):
        rest = ""
    rows = itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines())
    cells = [row.strip("|").split("|", 1) for row in rows]
    found = {cell[0].strip(): cell[1].strip().split("; ") for cell in cells if len(cell) == 2}
    return found or {task: [UNKNOWN]}


def licence_rows(licences: dict[str, list[str]]) -> str:
    return "\n".join(f"| {name} | {'; '.join(of_task)} |" for name, of_task in licences.items())
