"""A benchmark of a task, as typed dataclasses: its protocol, the shards that it reads and the protocol's settings."""

import dataclasses
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")
Positive = Annotated[int, Field(gt=0)]
Part = Literal["shards", "query", "gallery"]

Protocol = Literal[
    "classification",  # top-1, top-5, mean per class
    "attributes",  # mA, F1 of images, mAP: of a task with binary_cross_entropy (PETA, RAP, PA-100K)
    "retrieval",  # query, gallery, cameras: CMC, mAP, mINP (Market-1501, MSMT17, DukeMTMC, VeRi-776, VERI-Wild)
    "recall",  # Recall@k: of shards, each image against all others (SOP, CUB); or query and gallery (In-shop)
    "random_gallery",  # one image of each identity is the gallery, drawn ten times (VehicleID)
    "verification",  # a list of pairs in folds (LFW, CFP, CPLFW, CALFW, AgeDB)
    "templates",  # sets of images compared as one (IJB-B, IJB-C)
    "identification",  # query against one template for each identity of the gallery, some perhaps not there (IJB 1:N)
    "one_shot",  # which of N images, one of each of N identities, shows the same one (Omniglot)
]
OF_LOGITS: tuple[Protocol, ...] = ("classification", "attributes")  # the others are of embeddings
# The shards that each protocol reads.
_READS: dict[str, tuple[tuple[str, ...], ...]] = dict.fromkeys(get_args(Protocol), (("shards",),)) | {
    "retrieval": (("query", "gallery"),),
    "identification": (("query", "gallery"),),
    "recall": (("shards",), ("query", "gallery")),
}
# The settings that not every protocol has.
_SETTINGS = {
    "at": ("recall",),
    "draws": ("random_gallery",),
    "ways": ("one_shot",),
    "episodes": ("one_shot",),
    "query_expansion": ("retrieval",),
    "rerank": ("retrieval",),
}


@dataclass(config=STRICT, kw_only=True, frozen=True)
class QueryExpansion:
    """Each query plus its nearest gallery images, weighted by their cosine to the power ``alpha`` (Radenović et al.,
    2018; with 0 all alike: Chum et al., 2007)."""

    k: Positive = 5
    alpha: Annotated[float, Field(ge=0)] = 3.0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Rerank:
    """By k-reciprocal neighbours (Zhong et al., 2017)."""

    k1: Positive = 20  # neighbours that must be mutual
    k2: Positive = 6  # of the local query expansion
    weight: Annotated[float, Field(ge=0, le=1)] = 0.3  # of the original distance; the Jaccard distance has the rest


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Benchmark:
    """Held-out images and what is measured on them. Shards are of the forms that a train set has."""

    name: str
    protocol: Protocol
    shards: str | None = None
    query: str | None = None
    gallery: str | None = None
    flip: bool = False  # average the outputs of each image and its mirror image
    at: tuple[Positive, ...] | None = None  # recall: the ks (default 1, 10, 100, 1000)
    draws: Positive | None = None  # random_gallery (default 10)
    ways: Annotated[int, Field(ge=2)] | None = None  # one_shot: N (default 20)
    episodes: Positive | None = None  # one_shot (default 1000)
    query_expansion: QueryExpansion | None = None
    rerank: Rerank | None = None

    @model_validator(mode="after")
    def _has_its_shards(self) -> "Benchmark":
        given = tuple(self.parts)
        reads = _READS[self.protocol]
        if given not in reads:
            needs = ", or ".join(" and ".join(keys) for keys in reads)
            raise ValueError(f"{self.name}: protocol {self.protocol} needs {needs}, nothing else")
        return self

    @model_validator(mode="after")
    def _has_only_its_settings(self) -> "Benchmark":
        for key, protocols in _SETTINGS.items():
            if getattr(self, key) is not None and self.protocol not in protocols:
                raise ValueError(f"{self.name}: {key} is for protocol {' and '.join(protocols)}: remove it")
        return self

    @property
    def parts(self) -> dict[Part, str]:
        """The shards that it reads, the query before the gallery."""
        keys: tuple[Part, ...] = get_args(Part)
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """All but what is measured on which images, where it is not the default: as plain values."""
        values = dataclasses.asdict(self)
        return {
            field.name: values[field.name] for field in dataclasses.fields(self)
            if field.name not in ("name", "protocol", *get_args(Part)) and values[field.name] != field.default
        }  # fmt: skip

    def given(self, *keys: str) -> dict[str, Any]:
        """Of these settings those that the recipe gives; the protocols have the defaults of the others."""
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
