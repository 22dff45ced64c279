"""What is particular to a model family: which tokens stand for pictures, which modules see, how a batch is completed.

A family is one file beside this one, named after the transformers `model_type`, with an object `FAMILY`; its entry point
in the group `vlmtune.families` makes it known. `Family` itself holds what most families share.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmtune import plugins
from vlmtune.batch import flatten
from vlmtune.errors import ModelError, RecipeError
from vlmtune.sizes import SizesOnly, as_tensors, flat, run_without_pixels


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
    pictures_at_once: int = 8  # that go through the tower together where their features are kept

    @property
    def sees(self) -> re.Pattern[str]:
        """Names of the parameters of the vision tower and projector; of a family without these, none."""
        return re.compile(rf"(?:.*\.)?(?:{'|'.join(self.frozen_modules)})\." if self.frozen_modules else r"(?!)")

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

    def as_written(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as `chat_template` takes them, where a template alone cannot write what the makers' encoder does."""
        return messages

    def process(self, processor: Any, conversations: list[list[dict[str, Any]]], **options: Any) -> dict[str, Tensor]:
        """The processor's batch for conversations whose pictures are opened; `options` of `apply_chat_template`."""
        # transformers goes through a tensor of offsets token by token to make the assistant mask: through lists, 5 times faster
        as_lists = isinstance(getattr(processor, "image_processor", None), SizesOnly)
        batch = processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors=None if as_lists else "pt", **options
        )
        return {name: torch.as_tensor(values) for name, values in batch.items()}

    def picture_inputs(self, image_processor: Any, images: Any, **options: Any) -> dict[str, Any]:
        """What the image processor returns for pictures apart from their pixels; only their sizes are looked at.

        Families whose arithmetic is a line or two do that instead of running the processor.

        Args:
            image_processor: the real one.
            images: arrays `[height, width, 3]`, flat or nested, as the processor hands them on.
            **options: what the processor passes to the image processor.

        """
        return run_without_pixels(image_processor, images, options)

    def flatten(self, batch: Mapping[str, Any], core: Any) -> dict[str, Any]:
        """The rows of a padded batch as one packed row, in which none sees another.

        Args:
            batch: what the collator makes; with `image_features` in place of pixels where they are at hand.
            core: the model without its head, perhaps on the meta device; it knows the positions where they are not 0, 1, 2, …

        """
        if not hasattr(core, "get_rope_index"):
            return flatten(batch)
        known = inspect.signature(core.get_rope_index).parameters
        positions, _ = core.get_rope_index(**{name: batch[name] for name in known if name in batch})  # [3, batch, seq]
        plain = torch.arange(positions.shape[-1]).expand_as(positions[:1])  # by which a row's beginning is told
        return flatten(batch, torch.cat([plain, positions]))

    def encode(self, core: Any, batch: Mapping[str, Any]) -> list[Tensor]:
        """What the language model gets to see of each picture in a batch, `[tokens, hidden]` each."""
        known = inspect.signature(core.get_image_features).parameters
        inputs = {name: batch[name] for name in known if name in batch}
        return list(core.get_image_features(**inputs, return_dict=True).pooler_output)

    def feature_length(self, batch: Mapping[str, Any], tokens: int) -> int:
        """How long a picture's features are, told without its pixels; their bytes grow with it.

        Args:
            batch: of the picture alone, all but its pixels.
            tokens: that stand for it.

        """
        return tokens

    def join_features(self, batch: Mapping[str, Any], features: Sequence[Tensor]) -> Tensor:
        """Features of all pictures of a padded batch as the tensor `image_features` that goes in place of their pixels."""
        return torch.cat(list(features))

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as the model's forward takes it: `image_features` under the name that transformers has for them."""
        if "image_features" not in batch:
            return dict(batch)
        inputs = {name: values for name, values in batch.items() if name != "image_features"}
        features: Any = (batch["image_features"],)  # of all pictures as if of one: models join them anyway
        return {**inputs, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


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


def grids(image_processor: Any, images: Any, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """`picture_inputs` of Qwen-VL's image processor; None for another one, and for settings that are rarely used."""
    settings = {**vars(image_processor), **options}
    if type(image_processor).__name__ != "Qwen2VLImageProcessor" or not settings["do_resize"]:
        return None
    if settings.get("min_pixels") or settings.get("max_pixels"):  # the old names of the edges of `size`
        return None
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # imports torchvision: takes a second

    size, patch = dict(settings["size"]), settings["patch_size"]
    areas = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    factor = patch * settings["merge_size"]
    resized = [smart_resize(*array.shape[:2], factor=factor, **areas) for array in flat(images)]
    thw = [[1, height // patch, width // patch] for height, width in resized]
    return as_tensors({"image_grid_thw": torch.tensor(thw)}, options)


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
