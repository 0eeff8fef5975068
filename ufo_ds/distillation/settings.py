"""How a student is trained, as one value."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        logits_weight: of the symmetric divergence between the student's logits and the teacher's.
        feature_weight: of the distance of the student's embedding from the teacher's.
        relation_weight: of distances between samples.
        label_weight: of the recipe's losses of the task, where images have labels.
        temperature: by which logits are divided.
        feature_loss: ``cosine``, or ``mse`` of features as they are.
        steps, batch_size: of the training.
        views: augmented views of each image.
        mixup_prob: share of the views that are mixed with another one.
        lr: the highest, after warm-up.
        weight_decay: of matrices.
        warmup: share of the steps.
        average: decay of the moving average of the weights, which is what is written.
        seed: of all that is drawn.
    """

    logits_weight: float
    feature_weight: float
    relation_weight: float
    label_weight: float
    temperature: float
    feature_loss: Literal["cosine", "mse"]
    steps: int
    batch_size: int
    views: int
    mixup_prob: float
    lr: float
    seed: int
    weight_decay: float = 0.05
    warmup: float = 0.05
    average: float = 0.99

    @property
    def of_teacher(self) -> bool:
        """Whether anything is learned from the teacher."""
        return bool(self.logits_weight or self.feature_weight or self.relation_weight)
