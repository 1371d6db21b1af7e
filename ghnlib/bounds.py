"""Values that params.yaml and the file of a hypernetwork may hold, each kind with its bounds."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

MOST = 10**7
"""Networks, steps or whatever else is counted: beyond what the papers do and what a list can hold."""
FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""Tuples that may be given as lists, as JSON does."""


def unless(wrong: Callable[[Any], bool], message: str) -> AfterValidator:
    """Refuses values that are wrong, with an error of this message."""

    def check(value: Any) -> Any:
        if wrong(value):
            raise PydanticCustomError("refused", message)
        return value

    return AfterValidator(check)


DIFFERENT = unless(lambda values: len({*values}) < len(values), "each may be named only once")
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
"""Lower case, digits, dots and dashes: it becomes part of file names."""
TAKEN = {
    *("sources", "architectures", "train", "evaluate", "finetune", "transfer", "analysis", "anytime", "claims"),
    *("random", "orthogonal", "trained", "parameters", "one-shot"),
    *("null", "true", "false"),
}
"""Stages, rows and columns of the reports' tables, words of YAML: a variant of this name would be mistaken for them, as
would one for another's predictions after orthogonal processing, or with their class layer."""

VariantName = Annotated[
    str,
    Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64),
    unless(
        lambda name: name in TAKEN or name.endswith(("-orth", "-head")),
        "this name stands for something else, choose another",
    ),
]
"""No dots either: DVC reads them as the keys of mappings."""
Folder = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$", max_length=4096)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[int, Field(gt=0, le=MOST)]
Batch = Annotated[int, Field(ge=2, le=2**16)]
"""Images a step, or a batch: batch norm needs two to take the statistics of."""
Side = Annotated[int, Field(ge=8, le=1024)]
"""Pixels: networks halve them up to three times."""
Width = Annotated[int, Field(gt=0, le=2**14)]
"""Channels, or features of a layer."""
Depth = Annotated[int, Field(gt=0, le=200)]
Kernel = Annotated[int, Field(gt=0, le=256)]
Classes = Annotated[int, Field(gt=0, le=10**6)]
"""Sizes of a hypernetwork, as the width far above those of the papers: a file that asks for more is damaged or
hostile."""
Bits = Annotated[int, Field(ge=2, le=16)]
"""Of a quantised weight."""
Few = Annotated[int, Field(gt=0, le=1024)]
"""Processes, devices; nodes, cells and exits of a network."""
Rate = Annotated[float, Field(gt=0, le=1e20)]
"""Learning rate: one that is too high ends its own run alone."""
Amount = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Device = Literal["auto", "cpu", "cuda"]
Logger = Literal["csv", "tensorboard"]
Source = Literal["digits", "cifar10", "cifar100", "imagenet", "folder"]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, max_length=100), DIFFERENT]
Names = Annotated[tuple[Name, ...], Field(min_length=1, max_length=100), DIFFERENT]
Rates = Annotated[tuple[Rate, ...], Field(min_length=1, max_length=100)]
NonNegatives = Annotated[tuple[NonNegative, ...], Field(min_length=1, max_length=100)]


Metrics = Annotated[
    tuple[Literal["accuracy", "balanced_accuracy", "macro_f1", "auc"], ...],
    Field(min_length=1),
    DIFFERENT,
    unless(lambda metrics: metrics[0] != "accuracy",
           "accuracy comes first: settings are chosen and claims decided by it"),
]  # fmt: skip
Networks = Annotated[tuple[Name, ...], Field(max_length=100), DIFFERENT]
"""Of torchvision, by name."""
OwnNetwork = Annotated[str, Field(pattern=r"^([a-z0-9._-]+|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$", max_length=256)]
OwnNetworks = Annotated[tuple[OwnNetwork, ...], Field(max_length=100), DIFFERENT]
"""Of torchvision, by name, or "module:function"."""


RatesByOptimizer = Annotated[
    dict[Literal["sgd", "adam", "adamw"], Annotated[tuple[Rate, ...], Field(max_length=100)]],
    unless(lambda lrs: not any(lrs.values()), "at least 1 rate of one optimizer is needed"),
]
"""Learning rates to choose from; an empty list leaves an optimiser out."""
