"""A student's directory: weights, preprocessing, the recipe of its task, and a card that says where it comes from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ufo_ds import checkpoint
from ufo_ds.checkpoint import write_text
from ufo_ds.data.image_files import Images
from ufo_ds.distillation.settings import Settings
from ufo_ds.distillation.teachers import Teachers
from ufo_ds.model.loading import spec_of
from ufo_ds.model.students import UfoStudentModel
from ufo_ds.recipe_file import to_yaml
from ufo_ds.subnets import licences
from ufo_ds.subnets.extraction import RECIPE, image_processor
from ufo_ds.subnets.model_card import CARD, LICENCES, licence_rows, licences_on_card
from ufo_ds.subnets.task_model import is_model

STUDENTS = "ufo_ds.model.students"


def write(directory: Path, student: UfoStudentModel, teachers: Teachers) -> None:
    """All but the card."""
    student.save_pretrained(directory)
    image_processor(teachers.recipe, teachers.recipe.tasks[0]).save_pretrained(directory)
    write_text(directory / RECIPE, to_yaml(teachers.recipe))


def licences_behind(paths: Sequence[Path], task: str) -> dict[str, list[str]]:
    """By task those of the images behind the weights of teachers, from a run's checkpoint or a model's card."""
    found: dict[str, list[str]] = {}
    for path in paths:
        if is_model(path):
            of_path = licences_on_card(path / CARD, task)
        else:
            reader = checkpoint.Reader(checkpoint.of_run(path))
            of_path = licences.behind(reader.index, reader.recipe, spec_of(reader, task))
        for name, names in of_path.items():
            found[name] = list(dict.fromkeys([*found.get(name, []), *names]))
    return found


def write_card(
    directory: Path,
    student: UfoStudentModel,
    teachers: Teachers,
    inherited: Mapping[str, Sequence[str]],
    images: Sequence[Images],
    settings: Settings,
    metrics: Mapping[str, float],
    of_teacher: Mapping[str, float],
) -> None:
    """A model card, with the front matter that the hub reads.

    Args:
        inherited: licences by task, as :func:`licences_behind` finds them.
        images: that it was distilled on.
        metrics, of_teacher: of the student and of its teacher, by ``task/benchmark/metric``.
    """
    task, config = teachers.recipe.tasks[0], student.config
    linear = task.head.type == "linear"
    parameters = sum(p.numel() for p in student.parameters())
    use = (
        f"AutoModelForImageClassification.from_pretrained(path)(**inputs).logits"
        f"{'.sigmoid()  # of each attribute' if task.loss.multi_label else ''}" if linear
        else "AutoModel.from_pretrained(path)(**inputs).pooler_output  # compare by cosine"
    )  # fmt: skip
    on = list(dict.fromkeys(source.licence for source in images))
    rows = {name: list(names) for name, names in inherited.items()} if settings.of_teacher else {}
    rows["distilled on"] = on
    scores = "\n".join(
        f"| {name} | {value:.4f} | {of_teacher.get(name, float('nan')):.4f} |" for name, value in metrics.items()
    )
    taught = ", ".join(f"`{model.name}`" for model in teachers.models)
    weights = ", ".join(
        f"{name} {getattr(settings, f'{name}_weight'):g}" for name in ("logits", "feature", "relation", "label")
    )
    text = f"""---
library_name: transformers
pipeline_tag: {"image-classification" if linear else "image-feature-extraction"}
---

# {task.name}

A `{config.backbone}` (width {config.width:g}) for the task `{task.name}`, {parameters / 1e6:.3f} M parameters, input
{task.input[0]}x{task.input[1]}, made with ufo_ds (`ufo distill`).

| | |
|---|---|
| teacher | {taught if settings.of_teacher else "none: labels alone"} |
| parameters of the teacher | {teachers.parameters / 1e6:.3f} M |
| images | {sum(len(source.names) for source in images):,} |
| views | {settings.views} of each image, {settings.mixup_prob:.0%} of them mixed with others |
| weights of the losses | {weights}; temperature {settings.temperature:g}, feature loss {settings.feature_loss} |
| training | {settings.steps} steps of {settings.batch_size}, learning rate {settings.lr:g}, seed {settings.seed} |

```python
from PIL import Image
from transformers import AutoImageProcessor, {"AutoModelForImageClassification" if linear else "AutoModel"}
import {STUDENTS}  # registers the model's class with transformers

inputs = AutoImageProcessor.from_pretrained(path)(Image.open(file), return_tensors="pt")
{use}
```

| metric | student | teacher |
|---|---|---|
{scores or "| none measured | | |"}

{LICENCES}{licence_rows(rows)}
"""
    write_text(directory / CARD, text)
