"""What params.yaml may say of hypernetworks: what they share, and what each variant of them changes."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from ghnlib.bounds import Few, Logger, Seeds, VariantName
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


def _fields_of(cls: type) -> dict[str, Any]:
    """A dataclass's fields as pydantic fields, so that each option is declared once; the data tell the classes."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: (hints[f.name], f.default) for f in fields(cls) if f.name != "num_classes"}


GHNSection = create_model("GHNSection", __base__=Section, **_fields_of(GHNConfig))
RecipeSection = create_model("RecipeSection", __base__=Section, **_fields_of(Recipe))
Variant = create_model("Variant", __base__=Section, **_fields_of(GHNConfig), **_fields_of(Recipe))
"""What a variant changes: any key of ``train.ghn`` or ``train.recipe``."""


USED = {
    "rank": ("decoder", ("lowrank",)), "window": ("decoder", ("conv", "mlp")), "fan": ("weight_norm", (True,)),
    "virtual_edges": ("encoder", ("gated_gnn", "graphormer")), "directions": ("encoder", ("gated_gnn", "graphormer")),
    "stacked": ("encoder", ("gated_gnn",)), "passing": ("stacked", (True,)), "modules": ("stacked", (True,)),
    **dict.fromkeys(("heads", "attention", "centrality", "input_distance", "batching"), ("encoder", ("graphormer",))),
}  # fmt: skip
"""Options that change nothing but where another has one of these values. The layers of an MLP are none: it may name
those of the variant that it is compared with."""
CONTINUED = 0.5
"""Of ``train.recipe.lr``, where a variant that starts from a trained hypernetwork gives no rate."""


def _unused(config: GHNConfig, stated: Iterable[str]) -> Iterator[str]:
    for key in sorted(USED.keys() & stated):
        other, values = USED[key]
        if (found := getattr(config, other)) not in values:
            yield f"{key} changes nothing with {other}={found}, only with {' or '.join(map(str, values))}: leave it out"


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
                reasons = list(_unused(self.config(name), self.variants[name].model_fields_set))
            except ValidationError as error:
                reasons = [e["msg"].removeprefix("Value error, ") for e in error.errors()]
            if reasons:
                text = f"variants.{name}: {'; '.join(reasons)}"
                raise PydanticCustomError("impossible", "{text}", {"text": text})
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
