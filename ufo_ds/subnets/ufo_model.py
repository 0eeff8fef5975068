"""A trained model as it is: all of its tasks at once, or some.

from ufo_ds import UfoModel

model = UfoModel.from_pretrained("runs/mine", tasks=["person", "flowers"])
model(["a.jpg", "b.jpg"], task="person").embedding                      # [2, D]
model(["c.jpg", "a.jpg"], task=["flowers", "person"])[0].logits         # [C], of model.classes["flowers"]
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ufo_ds import checkpoint
from ufo_ds.data.image_files import read_image
from ufo_ds.data.mixing import Batch, TaskBatch
from ufo_ds.data.transforms import CorruptImage, evaluation_transform
from ufo_ds.devices import check_device
from ufo_ds.errors import UserError
from ufo_ds.model.heads import Outputs
from ufo_ds.model.loading import fill, meta_supernet, spec_of
from ufo_ds.model.supernet import Supernet
from ufo_ds.recipe import only
from ufo_ds.recipe_task import Size
from ufo_ds.subnets import recalibration
from ufo_ds.subnets.task_model import is_model

AnyImage = Tensor | Image.Image | str | Path | bytes


class UfoModel(nn.Module):
    """Tasks of a supernet, each on its path; in evaluation mode, and not for training.

    Attributes:
        supernet: what computes.
        tasks: their names.
        classes: of each task the names behind its logits; none of a margin head.
        input: height and width of each task's images.
    """

    def __init__(self, supernet: Supernet, classes: Mapping[str, list[str]]):
        super().__init__()
        self.supernet = supernet
        self.tasks = list(supernet.tasks)
        self.classes = {
            name: classes[name] if task.head.type == "linear" else [] for name, task in supernet.tasks.items()
        }
        self.input: dict[str, Size] = {name: task.input for name, task in supernet.tasks.items()}
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tasks: Sequence[str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        device_map: str | Mapping[str, int | str | torch.device] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
    ) -> "UfoModel":
        """Load what the paths of some tasks need, and nothing else.

        Args:
            path: a run directory (its best checkpoint), a checkpoint, or several tasks of ``ufo extract``.
            tasks: their names; default: all.
            dtype: of the parameters; default: fp32. Outputs are fp32 in any case.
            device_map: spread a model larger than one device, in place of ``device``: "auto" or the place of every
                module; see :func:`ufo_ds.model.spreading.spread`, also for ``max_memory`` and ``offload_folder``.

        Raises:
            UserError: no model is there, it is damaged, it lacks a task, a device is not there, or statistics of a neck
                that belong to the path have to be found and the task's train sets are not here.
        """
        check_device(device, "device")
        path = Path(path)
        if is_model(path):
            raise UserError(f"{path} is a model of one task: its README.md says how to open it")
        reader = checkpoint.Reader(checkpoint.of_run(path))
        wanted = [tasks] if isinstance(tasks, str) else tasks
        if wanted is not None and not wanted:
            raise UserError("tasks: none: name those to load, or leave it out for all")
        recipe = reader.recipe if wanted is None else only(reader.recipe, [*wanted])
        specs = [spec_of(reader, task.name) for task in recipe.tasks]
        statistics: dict[str, Tensor] = {}
        for spec in specs:
            statistics |= recalibration.statistics(reader, spec, device=device)
        supernet = meta_supernet(reader, specs, dtype, cosines=False)
        if device_map is None:
            fill(reader, supernet, device)
        else:
            from ufo_ds.model.spreading import spread

            spread(reader, supernet, device_map, max_memory, offload_folder)
        for name, value in statistics.items():
            supernet.get_buffer(name)[: len(value)].copy_(value)
        return cls(supernet, reader.index.classes)

    @property
    def device(self) -> torch.device:
        """Where images go and outputs are."""
        return self.supernet.mean.device

    @torch.no_grad()
    def forward(
        self, images: Tensor | Sequence[AnyImage] | AnyImage, task: str | Sequence[str]
    ) -> Outputs | list[Outputs]:
        """Run images in one pass, each along the path of its task, without gradients.

        Args:
            images: a batch uint8 [B, 3, H, W]; or images one by one, each a file, its bytes, a PIL image, or uint8
                [3, H, W]. Tensors have the task's :attr:`input` size; all others are resized to it, to the pixels that
                evaluation and extracted models see.
            task: of all images; or the task of each, in any order.

        Returns:
            Of one task: embeddings [B, D] and logits [B, C]. Of a list of tasks: a list with one image's outputs
            each, embedding [D] and logits [C], in the order of the images. fp32, on :attr:`device`. Logits are those of
            :attr:`classes`, C = 0 for a margin head. Embeddings are compared by cosine: :meth:`Outputs.cosine`.

        Raises:
            UserError: a task that was not loaded, an image that is none or has not the size of its task, or not as many
                tasks as images.
        """
        if isinstance(images, Image.Image | str | Path | bytes):
            images = [images]
        tasks = [task] * len(images) if isinstance(task, str) else [*task]
        if len(tasks) != len(images):
            raise UserError(f"{len(images)} images and {len(tasks)} tasks: give one task an image, or one for all")
        wanted = {task} if isinstance(task, str) else set(tasks)
        for name in wanted - set(self.tasks):
            raise UserError(f"no task {name!r} in this model: it was opened with {', '.join(self.tasks)}")
        # Of one size side by side: their attention is then one call.
        order = sorted(wanted, key=lambda name: (self.input[name], self.tasks.index(name)))
        places = {name: [i for i, of_image in enumerate(tasks) if of_image == name] for name in order}
        outputs = self._run({name: self._pixels(images, positions, name) for name, positions in places.items()})
        if isinstance(task, str):
            return outputs[task]
        rows: dict[int, Outputs] = {}
        for name, positions in places.items():
            rows |= zip(positions, map(Outputs, *outputs[name]), strict=True)
        return [rows[i] for i in range(len(tasks))]

    def train(self, mode: bool = True) -> "UfoModel":
        """
        Raises:
            UserError: it is to be trained.
        """
        if mode:
            raise UserError("a UfoModel is for use: a run trains on with --run_dir, and ufo extend adds a task")
        return super().train(False)

    def _run(self, pixels: Mapping[str, Tensor]) -> dict[str, Outputs]:
        none = torch.empty(0, dtype=torch.int64)
        batch = {name: TaskBatch(x, none, range(len(x)), len(x)) for name, x in pixels.items()}
        outputs: Any = self.supernet(Batch(0, 0, batch, {}))
        return {name: Outputs(*(x.to(self.device) for x in of_task)) for name, of_task in outputs.items()}

    def _pixels(self, images: Tensor | Sequence[AnyImage], positions: Sequence[int], task: str) -> Tensor:
        """uint8 [B, 3, H, W] of those of a task."""
        if isinstance(images, Tensor):
            self._check(images, 4, "images are", task)
            return (images if len(positions) == len(images) else images[positions]).to(self.device)
        pixels = [self._one(images[i], f"image {i}", task) for i in positions]
        return torch.stack(pixels) if pixels else torch.empty(0, 3, *self.input[task], dtype=torch.uint8)

    def _one(self, image: AnyImage, name: str, task: str) -> Tensor:
        """uint8 [3, H, W]"""
        if isinstance(image, Tensor):
            self._check(image, 3, f"{name} is", task)
            return image.to(self.device)
        try:
            if isinstance(image, str | Path):
                name = str(image)
                image = read_image(Path(image))
            elif not isinstance(image, Image.Image | bytes):
                raise UserError(
                    f"{name} is a {type(image).__name__}: give a file, bytes, a PIL image or a uint8 tensor"
                )
            return torch.from_numpy(evaluation_transform(image, self.input[task])).to(self.device)
        except CorruptImage as error:
            raise UserError(f"{name} is no image that can be read ({error}): give another") from None

    def _check(self, images: Tensor, dimensions: int, found: str, task: str) -> None:
        height, width = self.input[task]
        shape = images.shape
        if images.dtype != torch.uint8 or len(shape) != dimensions or shape[-3:] != (3, height, width):
            wanted = f"[{'B, ' if dimensions == 4 else ''}3, {height}, {width}]"
            dtype = str(images.dtype).removeprefix("torch.")
            raise UserError(
                f"{found} {dtype} {list(shape)}: {task} takes uint8 {wanted}, or files and PIL images of any size"
            )
