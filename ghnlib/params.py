"""What params.yaml may hold: typed sections, each the argument of what it describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from ghnlib.bounds import (
    MOST,
    Amount,
    Batch,
    BelowOne,
    Bits,
    Count,
    Device,
    Few,
    Folder,
    Logger,
    Metrics,
    Name,
    Names,
    Networks,
    NonNegative,
    NonNegatives,
    OwnNetworks,
    Positive,
    Rate,
    Rates,
    RatesByOptimizer,
    Seed,
    Seeds,
    Share,
    Side,
    Source,
    VariantName,
    Width,
    different,
)
from ghnlib.config import GHNConfig, Recipe


class Section(BaseModel):
    """A mapping of params.yaml with these keys and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The section of plain values, such as those of a notebook's parameters cell. Raises pydantic's
        ValidationError, a ValueError."""
        # By way of JSON: there a list stands for a tuple, and nothing else is converted.
        return cls.model_validate_json(json.dumps(values, default=str))


class Data(Section):
    """Images, see ``load_images``."""

    source: Source
    root: Folder | None
    image_size: Side | None
    val_share: Share
    test_share: Share
    test_per_class: Positive | None
    shift: Annotated[int, Field(ge=0, le=512)]
    flip: bool
    download: bool
    resident_gib: NonNegative

    @property
    def learnt_from(self) -> dict[str, Any]:
        """What decides which images a training sees, not how they are augmented, read or tested on: with other values
        it is another training."""
        return self.model_dump(exclude={"shift", "flip", "test_per_class", "download", "resident_gib"})


class DeepNets(Section):
    """Design space and number of architectures of each split. ``path``: folder of the released HDF5 files with their
    meta JSON, from which architectures are read instead of sampled. ``extra``: networks of one's own, see
    ``own_networks``, that the share ``extra_share`` of a variant's recipe is drawn from."""

    scale: Literal["small", "paper"]
    path: Folder | None
    train_pool: Positive
    val: Positive
    test: Positive
    ood: Positive
    extra: OwnNetworks = ()


class Architectures(Section):
    """Statistics beyond those of the profile's own architectures."""

    networks: Positive
    torchvision: bool


def _fields_of(cls: type) -> dict[str, Any]:
    """A dataclass's fields as pydantic fields, so that each option is declared once; the data tell the classes."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: (hints[f.name], f.default) for f in fields(cls) if f.name != "num_classes"}


GHNSection = create_model("GHNSection", __base__=Section, **_fields_of(GHNConfig))
RecipeSection = create_model("RecipeSection", __base__=Section, **_fields_of(Recipe))
Variant = create_model("Variant", __base__=Section, **_fields_of(GHNConfig), **_fields_of(Recipe))
"""What a variant changes: any key of ``train.ghn`` or ``train.recipe``."""


CONTINUED = 0.5
"""Of ``train.recipe.lr``, where a variant that starts from a trained hypernetwork gives no rate."""


class Hypernetworks(Section):
    """What hypernetworks share, and for each variant what it changes."""

    ghn: GHNSection
    recipe: RecipeSection
    variants: Annotated[dict[VariantName, Variant], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _possible_hypernetworks(self) -> Self:
        for name in self.variants:
            if getattr(self.variants[name], "start_from", None):
                continue  # its architecture is known when the file is read
            try:
                self.config(name)
            except ValidationError as error:
                reasons = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
                text = f"variants.{name}: {reasons}"
                raise PydanticCustomError("impossible", "{text}", {"text": text}) from None
        return self

    def config(self, name: str, num_classes: int = 10) -> GHNConfig:
        """The hypernetwork of a variant, for so many classes."""
        return GHNConfig(**self._merged(name, self.ghn), num_classes=num_classes)

    def recipe_of(self, name: str) -> Recipe:
        """The training of a variant."""
        return Recipe(**self._merged(name, self.recipe))

    def _merged(self, name: str, common: Section) -> dict[str, Any]:
        own = self.variants[name].model_dump(exclude_unset=True)
        return common.model_dump() | {key: value for key, value in own.items() if key in type(common).model_fields}


class TrainVariant(Variant):
    """Also: a hypernetwork whose training it continues, as ``GHN.from_pretrained`` takes it; ``{seed}`` in it stands
    for the training's seed. Its architecture counts, not that of ``train.ghn``."""

    start_from: Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$", max_length=4096)] | None = None


class Train(Hypernetworks):
    """The hypernetworks of the report, each trained once for each of the ``seeds``."""

    seeds: Seeds
    devices: Few
    logger: Logger = "csv"
    variants: Annotated[dict[VariantName, TrainVariant], Field(min_length=1, max_length=100)]

    @property
    def plain(self) -> list[str]:
        """The variants that are trained on the design space alone; all, if none is."""
        return [name for name in self.variants if not self.recipe_of(name).extra_share] or list(self.variants)

    def start_of(self, name: str, seed: int) -> str | None:
        """What a training starts from; None: from nothing."""
        start = self.variants[name].start_from
        return start and start.replace("{seed}", str(seed))

    def stated(self, name: str) -> dict[str, Any]:
        """What a variant itself says of its hypernetwork."""
        own = self.variants[name].model_dump(exclude_unset=True)
        return {key: value for key, value in own.items() if key in GHNSection.model_fields}

    def recipe_of(self, name: str) -> Recipe:
        """The training of a variant; one that continues another has a lower rate where it gives none."""
        recipe, own = super().recipe_of(name), self.variants[name]
        lower = own.start_from and "lr" not in own.model_fields_set
        return replace(recipe, lr=CONTINUED * recipe.lr) if lower else recipe

    @property
    def trainings(self) -> dict[str, tuple[str, int]]:
        """Name of each training, "ghn3-0", the end of its stage's name -> variant and seed."""
        return {f"{name}-{seed}": (name, seed) for name in self.variants for seed in self.seeds}


class Sgd(Section):
    """Training of networks from random initialisation, see ``TrainingRecipe``; ``batch_size``: images a step."""

    batch_size: Batch
    lr: Rate
    weight_decay: NonNegative
    schedule: Literal["cosine", "step", "step-half", "constant"]
    label_smoothing: BelowOne


class Evaluate(Section):
    """Accuracy without fine-tuning, the yardsticks trained from random initialisation, other initialisations; weights
    of few ``bits``, left out without any."""

    batch_size: Batch
    bn_batches: Positive
    bn_networks: Positive
    torchvision: bool
    random_networks: Positive
    trained_networks: Positive
    ood_networks: Count
    epochs: Positive
    sgd: Sgd
    initialised_networks: Positive
    initialised_steps: Positive
    initialised_lrs: Rates
    learned_steps: Positive
    bits: Annotated[tuple[Bits, ...], Field(max_length=15), AfterValidator(different)]
    quantised_networks: Positive
    unseen: OwnNetworks = ()


class FineTune(Section):
    """SGD or AdamW from random, orthogonal and predicted initialisation; ResNet-50 by each of its optimisers. The i-th
    of ``seeds`` starts from predictions of the i-th training of each hypernetwork."""

    variants: Names
    networks: Positive
    top: Positive
    tuning_networks: Positive
    seeds: Seeds
    budgets: Annotated[tuple[Annotated[float, Field(gt=0, le=1e4)], ...], Field(min_length=1, max_length=100)]
    batch_size: Batch
    lrs: RatesByOptimizer
    weight_decays: NonNegatives
    schedule: Literal["cosine", "step", "constant"]
    label_smoothing: BelowOne
    families: Networks
    resnet50_steps: Count
    resnet50_variants: Networks
    resnet50_lrs: RatesByOptimizer


class Target(Section):
    """What of the section ``data`` differs for a dataset that networks are transferred to."""

    source: Source
    root: Folder | None
    image_size: Side | None
    test_per_class: Positive | None = None


class Detection(Section):
    """Faster R-CNN on scenes of digits, or on Penn-Fudan's images in ``root``."""

    root: Folder | None
    image_size: Annotated[int, Field(ge=64, le=4096)]
    train_scenes: Positive
    test_scenes: Positive
    backbones: Annotated[tuple[Count | Name, ...], Field(min_length=1, max_length=100), AfterValidator(different)]
    seeds: Seeds
    epochs: Positive
    batch_size: Few
    lrs: Rates
    hidden: Width
    proposals: Annotated[int, Field(gt=0, le=10**5)]


class Transfer(Section):
    """A hypernetwork trained on some classes, networks fine-tuned on few images of others, and for detection. It is
    trained once for each of ``seeds`` (or those of detection, if more) with the seeds of the section ``train``."""

    variant: Name
    targets: dict[Name, Target]
    source_classes: Positive
    per_class: Positive
    train_steps: Positive
    networks: Positive
    tuning_networks: Positive
    seeds: Seeds
    steps: Positive
    batch_size: Batch
    lrs: RatesByOptimizer
    weight_decays: NonNegatives
    orth_from: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1, max_length=100)]
    noise: NonNegatives
    source_lr: Rate
    source_epoch: bool
    families: Networks
    oracle_networks: Count
    oracle_epochs: Positive
    detection: Detection


class Regression(Section):
    """Settings of the SVR that predicts properties, see ``regression``."""

    C: Annotated[tuple[Amount, ...], Field(min_length=1, max_length=100)]
    gamma: Annotated[tuple[Literal["scale", "auto"] | Amount, ...], Field(min_length=1, max_length=100)]
    epsilon: NonNegatives


class Chosen(Section):
    """Training of the architectures that a search chooses (PPUDA Table 9): for the first of the ``steps`` plainly, for
    each of them regularised; without any it is left out."""

    steps: tuple[Positive, ...]
    seeds: Seeds
    cutout: Annotated[int, Field(ge=0, le=1024)]
    drop_path: Annotated[float, Field(ge=0, lt=1)]


class Analysis(Section):
    """Properties of trained networks, search, diversity, variance by depth, graph embeddings."""

    variants: Names | None
    networks: Positive
    images: Batch
    property_networks: Annotated[int, Field(ge=10, le=MOST)]
    property_steps: Positive
    repeated_networks: Positive
    checkpoints: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=100), AfterValidator(different)]
    sgd: Sgd
    score: Literal["accuracy", "top5"]
    noise: NonNegative
    converged: Annotated[float, Field(gt=0, le=100)]
    top: Positive
    one_shot_steps: Positive
    seconds: bool
    second: Target | None
    second_networks: Positive
    svr: Regression
    search_networks: Positive
    chosen: Chosen
    activations: Names
    activation_steps: Count
    distance_networks: Positive


class Blocks(Section):
    """Networks of the block space, see ``BlockSpace``: trained as ground truth, ranked by hypernetworks, after the
    ``shares`` of these SGD steps, and by a one-shot model."""

    nodes: Few
    train_nodes: Few
    cells: Few
    width: Width
    stem_pool: bool
    networks: Annotated[int, Field(ge=3, le=MOST)]
    steps: Positive
    shares: Annotated[tuple[Share, ...], Field(max_length=100)]
    one_shot_steps: Positive


class Choice(Section):
    """Architectures ranked by a hypernetwork, the best ``chosen`` trained."""

    candidates: Positive
    chosen: Positive
    steps: Positive

    @model_validator(mode="after")
    def _are_candidates(self) -> Self:
        if self.chosen > self.candidates:
            text = f"chosen = {self.chosen} of {self.candidates} candidates: at most all of them"
            raise PydanticCustomError("too_many", "{text}", {"text": text})
        return self


class Search(Choice):
    """Blocks; ``second``: images that the best are transferred to, with at most so many ``mflops`` an image."""

    second: Target | None
    mflops: Amount


class Exits(Choice):
    """Anytime networks, see ``AnytimeSpace``."""

    nodes: Annotated[tuple[Annotated[int, Field(ge=2, le=1024)], ...], Field(min_length=3, max_length=3)]
    exits: Few
    width: Width
    sgd: Sgd


class VanillaVariant(Variant):
    """Also: nodes of the blocks that it is trained on, in place of ``blocks.train_nodes``."""

    train_nodes: Few | None = None


class Anytime(Hypernetworks):
    """The hypernetworks of GHN 2018 on its spaces, each trained once for each of the ``seeds``: ranking blocks, search,
    anytime prediction."""

    seeds: Seeds
    variants: Annotated[dict[VariantName, VanillaVariant], Field(min_length=1, max_length=100)]
    train_networks: Positive
    val_networks: Positive
    sgd: Sgd
    blocks: Blocks
    search: Search
    exits: Exits

    def train_nodes(self, name: str) -> int:
        """Nodes of the blocks that a variant is trained on."""
        return self.variants[name].train_nodes or self.blocks.train_nodes


class Params(Section):
    """The whole of params.yaml."""

    profile: Name
    seed: Seed
    processes: Few
    device: Device
    metrics: Metrics
    data: Data
    deepnets: DeepNets
    architectures: Architectures
    train: Train
    evaluate: Evaluate
    finetune: FineTune
    transfer: Transfer
    analysis: Analysis
    anytime: Anytime

    @model_validator(mode="after")
    def _known_variants(self) -> Self:
        used = [
            ("transfer.variant", self.transfer.variant),
            *(("finetune.variants", v) for v in self.finetune.variants),
            *(("finetune.resnet50_variants", v) for v in self.finetune.resnet50_variants),
            *(("analysis.variants", v) for v in self.analysis.variants or ()),
        ]
        for key, name in used:
            if name not in self.train.variants:
                text = f"{key} = {name!r}: must be one of {', '.join(self.train.variants)}"
                raise PydanticCustomError("impossible", "{text}", {"text": text})
        return self
