"""A dense model taken from pixels to embeddings and logits."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ufo_ds.model.dense import network
from ufo_ds.model.heads import Outputs
from ufo_ds.model.hub import UfoViTModel
from ufo_ds.model.spec import SubnetSpec
from ufo_ds.recipe import Recipe
from ufo_ds.subnets.image_network import ImageNetwork


class DenseNetwork(ImageNetwork):
    """Backbone, pooler and, if there is one, classifier, in one pass over the backbone.

    Args:
        classifier: of a linear head, whose logits follow from the feature.
        cosines: of a margin head, whose logits follow from the embedding.
    """

    def __init__(
        self, recipe: Recipe, backbone: nn.Module, classifier: nn.Module | None, cosines: nn.Module | None = None
    ):
        super().__init__(recipe)
        self.backbone, self.classifier, self.cosines = backbone, classifier, cosines

    def of_pixels(self, pixels_BCHW: Tensor) -> Outputs:
        feature_BD, embedding_BD = self._run(pixels_BCHW)
        if self.classifier is not None:
            return Outputs(embedding_BD, self.classifier(feature_BD).float())
        return Outputs(embedding_BD, embedding_BD[:, :0] if self.cosines is None else self.cosines(embedding_BD))

    def feature(self, images: Tensor) -> Tensor:
        """What a neck would be given of uint8 [B, 3, H, W]: [B, D]."""
        return self._run(self.normalize(images))[0]

    def _run(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.backbone(pixels_BCHW)
        tokens_BLD = outputs.last_hidden_state
        feature_BD = self.backbone.pooled(tokens_BLD) if isinstance(self.backbone, UfoViTModel) else tokens_BLD[:, 0]
        return feature_BD, outputs.pooler_output.float()


def with_weights(
    recipe: Recipe, spec: SubnetSpec, state: Mapping[str, Tensor], cosines: nn.Module | None = None
) -> DenseNetwork:
    """The network of a path, in evaluation mode; the tensors of its ``state`` become its parameters."""
    classifier = None
    if "classifier.weight" in state:
        classes, dim = state["classifier.weight"].shape
        classifier = nn.Linear(dim, classes, device="meta")
        classifier.load_state_dict({kind: state[f"classifier.{kind}"] for kind in ("weight", "bias")}, assign=True)
    with torch.device("meta"):
        backbone = network(recipe, spec.task, spec.architecture)
    backbone.load_state_dict(
        {name: value for name, value in state.items() if not name.startswith("classifier.")}, assign=True
    )
    return DenseNetwork(recipe, backbone, classifier, cosines).eval()
