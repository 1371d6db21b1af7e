"""What params.yaml may hold: typed sections, each the argument of what it describes."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ghnlib.bounds import (
    DIFFERENT,
    MOST,
    Amount,
    Batch,
    BelowOne,
    Bits,
    Count,
    Device,
    Few,
    Folder,
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
)
from ghnlib.variants import Hypernetworks, Section, Train, Variant


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


class Sgd(Section):
    """Training of networks from random initialisation, see ``TrainingRecipe``; ``batch_size``: images a step."""

    batch_size: Batch
    lr: Rate
    weight_decay: NonNegative
    schedule: Literal["cosine", "step", "step-half", "constant"]
    label_smoothing: BelowOne


class Evaluate(Section):
    """Accuracy without fine-tuning, the yardsticks trained from random initialisation, other initialisations; weights
    of few ``bits``, left out without any; ``seconds`` of a training step, which differ from run to run."""

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
    bits: Annotated[tuple[Bits, ...], Field(max_length=15), DIFFERENT]
    quantised_networks: Positive
    seconds: bool
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
    backbones: Annotated[tuple[Count | Name, ...], Field(min_length=1, max_length=100), DIFFERENT]
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
    checkpoints: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=100), DIFFERENT]
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
