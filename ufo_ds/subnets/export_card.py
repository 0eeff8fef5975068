"""What the directory of an exported model says of it to people and to the hub."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ufo_ds.subnets.model_card import LICENCES, licence_rows
from ufo_ds.subnets.onnx_export import OPSET
from ufo_ds.subnets.task_model import TaskModel


@dataclass(frozen=True)
class Int8:
    """What rounding to int8 costs and brings, as ``quantization.json`` has it.

    Attributes:
        calibration: where its calibration images are from.
        images: their number.
        layers: computed in int8.
        bytes, ms: of the graphs; milliseconds of a call of one image on one thread of ``cpu``, measured in turns.
        before, after: metrics of the fp32 graph and of this one, by ``task/benchmark/metric``.
    """

    calibration: str
    images: int
    layers: int
    bytes: dict[str, int]
    ms: dict[str, float]
    cpu: str
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


def export_card(
    model: TaskModel,
    licences: dict[str, list[str]],
    size: int,
    certificate: Mapping[str, Any] | None,
    int8: Int8 | None,
    is_int8: bool,
) -> str:
    """A model card, with the front matter that the hub reads.

    Args:
        size: bytes of the graph.
        certificate: of the fp32 graph.
        is_int8: whether the card is of the int8 graph.
    """
    task = model.recipe.tasks[0]
    linear = bool(model.classes)
    names = '["embedding", "logits"]' if linear else '["embedding"]'
    assigned = "embedding, logits" if linear else "[embedding]"
    use = "# logits: of the names in classes.json, in their order" if linear else "# compare by cosine"
    started = model.recipe.model.init
    return f"""---
library_name: onnx
pipeline_tag: {"image-classification" if linear else "image-feature-extraction"}
---

# {task.name}

The model of the task `{task.name}` for ONNX Runtime, {"int8" if is_int8 else "fp32"}, opset {OPSET},
{size / 1e6:.2f} MB, input {task.input[0]}x{task.input[1]}, any number of images in a call. Made with ufo_ds
(`ufo export`) from `{model.name}`.

```python
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

pixels = AutoImageProcessor.from_pretrained(path)(Image.open(file), return_tensors="np")["pixel_values"]
session = onnxruntime.InferenceSession(f"{{path}}/model.onnx")
{assigned} = session.run({names}, {{"pixel_values": pixels}})  {use}
```
{_certificate(certificate, is_int8)}{"" if int8 is None else _int8(int8)}
{LICENCES}{licence_rows(licences)}
{"" if started is None else f"{chr(10)}Training started from `{started}`.{chr(10)}"}"""


def _certificate(certificate: Mapping[str, Any] | None, is_int8: bool) -> str:
    if is_int8:
        return "\nRounded to int8, so its outputs are not those of the fp32 model; what that changes is below.\n"
    if certificate is None:
        return "\nNot certified: it was not compared with the model that it was made from.\n"
    first, last = certificate["batch_sizes"]
    return f"""
| certificate | {certificate["images"]} image files, batches of {first} to {last} |
|---|---|
| largest difference to the torch model, of the largest output | {certificate["max_difference"]:.1e} |
| rank lists that are the same | all {certificate["rank_lists"]} |
"""


def _int8(found: Int8) -> str:
    scores = "\n".join(f"| {name} | {found.before[name]:.4f} | {value:.4f} |" for name, value in found.after.items())
    return f"""
| | fp32 | int8 |
|---|---|---|
| size, MB | {found.bytes["fp32"] / 1e6:.2f} | {found.bytes["int8"] / 1e6:.2f} |
| ms for one image, one thread ({found.cpu}) | {found.ms["fp32"]:.2f} | {found.ms["int8"]:.2f} |
{scores or "| metrics | not measured | not measured |"}

{found.layers} layers compute in int8; calibrated on {found.images} images of {found.calibration}.
"""
