"""What is particular to a model family: which tokens stand for pictures, which modules see, how a batch is completed.

A family is one file beside this one, named after the transformers `model_type`, with an object `FAMILY`; its entry point
in the group `vlmtune.families` makes it known. `Family` itself holds what most families share.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlmtune import plugins
from vlmtune.errors import ModelError, RecipeError


@dataclass(frozen=True)
class Family:
    """A model family. Every method has a default that suits models which keep transformers' conventions."""

    name: str
    model_types: frozenset[str] = frozenset()  # `config.model_type`
    processors: frozenset[str] = frozenset()  # class names of the processors that tell this family
    chat_template: str | None = None  # training template, for checkpoints whose own has no {% generation %} markers
    image_tokens: tuple[str, ...] = ()  # attributes of the processor that hold the tokens which stand for pictures
    language_module: str = r"(?:language_model|text_model)"  # regex of the module that reads and writes text
    frozen_modules: tuple[str, ...] = field(default=())  # regexes of the vision tower and projector: 16 bit, frozen
    takes_images: bool = True

    def matches(self, config: Any) -> bool:
        """Whether a checkpoint's config belongs to this family."""
        return config.model_type in self.model_types

    def image_token_ids(self, processor: Any) -> frozenset[int]:
        """Ids of all tokens that stand for pictures; they are never trained on."""
        tokens = [token for name in self.image_tokens if (token := getattr(processor, name, None)) is not None]
        return token_ids(processor, tokens)

    def video_token_ids(self, processor: Any) -> frozenset[int]:
        """Ids of the tokens that stand for video; they are never trained on either."""
        video = getattr(processor, "video_token", None)
        return token_ids(processor, [video] if video else [])

    def lora_targets(self, names: Collection[str], scope: str) -> str:
        """Regex on module names for LoRA on the modules `names` within `scope`: language, vision or all."""
        leaf = "|".join(re.escape(name) for name in sorted(names))
        language, vision = rf"{self.language_module}\.", rf"(?:{'|'.join(self.frozen_modules)})\."
        where = {"language": language, "vision": vision, "all": rf"(?:{language}|{vision})"}[scope]
        return rf"(?:.*\.)?{where}(?:.*\.)?(?:{leaf})"

    def set_pixels(self, processor: Any, *, min_pixels: int | None, max_pixels: int | None) -> None:
        """Sets the smallest and largest area, in pixels, to which the processor resizes a picture.

        Raises:
            RecipeError: this family's processor has no such setting.

        """
        raise RecipeError(f"images.min_pixels and images.max_pixels are not settings of {self.name}'s processor: remove them")

    def process(self, processor: Any, conversations: list[list[dict[str, Any]]], **options: Any) -> dict[str, Tensor]:
        """The processor's batch for conversations whose pictures are decoded; `options` of `apply_chat_template`."""
        return dict(
            processor.apply_chat_template(conversations, tokenize=True, return_dict=True, return_tensors="pt", **options)
        )


def token_ids(processor: Any, tokens: Collection[str]) -> frozenset[int]:
    """Ids of special tokens, leaving out those that the tokenizer does not know."""
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = tokenizer.get_vocab()
    return frozenset(vocabulary[token] for token in tokens if token in vocabulary)


def set_areas(processor: Any, *, min_pixels: int | None, max_pixels: int | None) -> None:
    """Sets the areas of Qwen-VL's processors, which keep min_pixels and max_pixels as the edges of `size`."""
    size = processor.image_processor.size
    processor.image_processor.size = {
        "shortest_edge": min_pixels or size["shortest_edge"],
        "longest_edge": max_pixels or size["longest_edge"],
    }


def find_family(wanted: Family | str | None = None, *, config: Any = None, processor: Any = None) -> Family:
    """The family that is asked for, or that a checkpoint's config or a processor tells.

    Args:
        wanted: a family, the name of one, or None to tell it from `config` or `processor`.

    Raises:
        ModelError: no family of that name.

    """
    if isinstance(wanted, Family):
        return wanted
    if wanted is not None:
        return _load(wanted)
    for family in map(_load, plugins.names(plugins.FAMILIES)):
        if config is not None and family.matches(config):
            return family
        if config is None and type(processor).__name__ in family.processors:
            return family
    sees = hasattr(config, "vision_config") if config is not None else hasattr(processor, "image_processor")
    return _load("generic" if sees else "text")


def _load(name: str) -> Family:
    try:
        family = plugins.load(plugins.FAMILIES, name)
    except LookupError:
        known = plugins.names(plugins.FAMILIES)
        raise ModelError(f"family {name!r} is unknown.{plugins.did_you_mean(name, known)}") from None
    if not isinstance(family, Family):
        raise ModelError(f"family {name!r} is a {type(family).__name__}, and should be a vlmtune.Family")
    return family
