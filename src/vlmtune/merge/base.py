"""The model that an adapter is for: all of it but its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from vlmtune.collator import MultimodalCollator
from vlmtune.errors import ModelError
from vlmtune.families import Family, find_family
from vlmtune.merge.adapter import Adapter
from vlmtune.merge.weights import Stored, stored
from vlmtune.model import load_config, read_processor, skeleton, weight_files
from vlmtune.recipe import ModelSection, load_recipe


@dataclass(frozen=True)
class Base:
    """A checkpoint; the processor is the one that the adapter was trained with, where that lies beside it."""

    section: ModelSection
    family: Family
    config: Any  # transformers' config
    collator: MultimodalCollator

    @property
    def processor(self) -> Any:
        return self.collator.processor

    @cached_property
    def model(self) -> PreTrainedModel:
        """It without weights."""
        return skeleton(self.section, self.family, self.config)

    @cached_property
    def files(self) -> list[Path]:
        return weight_files(self.section)

    @property
    def directory(self) -> Path:
        return self.files[0].parent

    @cached_property
    def tensors(self) -> list[Stored]:
        return [tensor for path in self.files for tensor in stored(path)]


def where(adapter: Adapter, name: str | None) -> ModelSection:
    """Where the base is: under this name, or by the recipe that lies with the adapter, or by the adapter's own config."""
    if (adapter.directory / "recipe.yaml").exists():
        section = load_recipe(adapter.directory / "recipe.yaml").model
    else:
        section = ModelSection(name=adapter.config.base_model_name_or_path or "?", revision=adapter.config.revision)
    return section.model_copy(update={"name": name, "revision": None}) if name else section


def find_base(section: ModelSection, adapter: Adapter, family: Family | str | None = None) -> Base:
    """The base that is there.

    Raises:
        ModelError: there is none, or it is quantised.

    """
    config = load_config(section)
    if getattr(config, "quantization_config", None):
        raise ModelError(f"the base {section.name} is quantised: name the one that is not, as `base`")
    found = find_family(family or section.family, config=config)
    own = adapter.directory if (adapter.directory / "tokenizer_config.json").exists() else None
    processor = read_processor(section, found, own)
    return Base(section, found, config, MultimodalCollator(processor, found, train_on_inputs=True))
