"""Token ids and all else that a processor returns, pixels apart, from the sizes of pictures.

How many tokens a row has, and every tensor beside the pixels, follows from the width and height of its pictures. So rows
can be counted, and batches be made whose pictures' features are known already, and no picture is decoded or resized:

    processor = without_pixels(processor, family)
    picture = {"type": "image", "image": blank(640, 480)}
    family.process(processor, [[{"role": "user", "content": [picture]}]])  # {"input_ids": …, "image_grid_thw": …}
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

TEXTS_REMEMBERED = 4096  # texts that stand for a picture
CALLS_REMEMBERED = 256  # of an image processor that are remembered, each some kilobytes


class TellsPictureInputs(Protocol):
    """A `Family`."""

    def picture_inputs(self, image_processor: Any, images: Any, **options: Any) -> dict[str, Any]: ...


def blank(width: int, height: int) -> NDArray[np.uint8]:
    """A picture of that size for `without_pixels`; it takes no memory. → `[height, width, 3]`"""
    return np.broadcast_to(np.uint8(0), (height, width, 3))


def without_pixels(processor: Any, family: TellsPictureInputs) -> Any:
    """A copy of the processor that returns what it returns but for the pixels, from pictures made by `blank`.

    It keeps the settings which the image processor has now; the processor given stays as it was.
    """
    processor = copy.copy(processor)
    processor.image_processor = SizesOnly(copy.copy(processor.image_processor), family)
    return processor


class TokenCounter:
    """Counts the tokens of rows without writing out those that stand for pictures: a picture may have thousands.

    Args:
        processor: one `without_pixels`, or a tokenizer.

    """

    def __init__(self, processor: Any) -> None:
        self._processor = copy.copy(processor)
        self._left_out: list[int] = []  # tokens of each picture but one
        self._known: dict[str, int] = {}
        self._plain = not hasattr(processor, "tokenizer")
        if not self._plain and hasattr(processor, "replace_image_token"):
            self._processor.replace_image_token = self._replace

    def __call__(self, conversations: Sequence[Any], chat_template: str) -> list[int]:
        """Tokens of each conversation, whose pictures are made by `blank`."""
        seen = [_pictures(messages) for messages in conversations]
        order = sorted(range(len(seen)), key=lambda row: not seen[row])  # Mllama's processor wants pictures first
        counts = self._count([conversations[row] for row in order], [seen[row] for row in order], chat_template)
        by_row = dict(zip(order, counts, strict=True))
        return [by_row[row] for row in range(len(seen))]

    def _count(self, conversations: Sequence[Any], seen: Sequence[int], chat_template: str) -> list[int]:
        self._left_out.clear()
        padding: dict[str, Any] = {"padding": False} if self._plain else {"processor_kwargs": {"padding": False}}
        encoded = self._processor.apply_chat_template(
            list(conversations), tokenize=True, return_dict=True, return_tensors=None, chat_template=chat_template, **padding
        )
        counts = list(map(len, encoded["input_ids"]))
        left_out = iter(self._left_out)
        if self._left_out:  # a processor may expand them in another way, and then they are counted
            counts = [count + sum(islice(left_out, pictures)) for count, pictures in zip(counts, seen, strict=True)]
        return counts

    def _replace(self, image_inputs: dict[str, Any], image_idx: int, **options: Any) -> str:
        text = type(self._processor).replace_image_token(self._processor, image_inputs, image_idx, **options)
        if text not in self._known:
            if len(self._known) == TEXTS_REMEMBERED:
                self._known.clear()
            self._known[text] = len(self._processor.tokenizer.encode(text, add_special_tokens=False))
        self._left_out.append(self._known[text] - 1)
        return self._processor.image_token


def _pictures(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many there are in a conversation; a language model's has plain texts."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return sum(part["type"] == "image" for part in parts)


class SizesOnly:
    """Stands in for an image processor: the same attributes, and pictures of which only the sizes are looked at."""

    def __init__(self, image_processor: Any, family: TellsPictureInputs) -> None:
        self._image_processor = image_processor
        self._family = family
        self._known: dict[Any, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:  # only for what is not found here
        if name.startswith("__") or name == "_image_processor":  # asked for by copy and pickle before they fill it in
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __call__(self, images: Any, **options: Any) -> dict[str, Any]:
        key = (_sizes(images), repr(options))
        if key not in self._known:
            if len(self._known) == CALLS_REMEMBERED:
                self._known.clear()
            self._known[key] = self._family.picture_inputs(self._image_processor, images, **options)
        return copy.deepcopy(self._known[key])  # processors take items out of it


def run_without_pixels(image_processor: Any, images: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What any image processor returns for pictures of these sizes.

    It runs on tensors that have a shape and no memory (https://docs.pytorch.org/docs/stable/meta.html) or, where it needs
    values, on black pictures.
    """
    encoded = _on_meta(image_processor, images, options)
    if encoded is None:
        black = _each(images, lambda array: Image.new("RGB", (array.shape[1], array.shape[0])))
        encoded = image_processor(black, **options)
    return _WithoutPixels(encoded)


def flat(images: Any) -> list[Any]:
    """The pictures of all rows, or the one picture, in one list."""
    return [image for row in images for image in flat(row)] if isinstance(images, list | tuple) else [images]


def as_tensors(encoded: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """As an image processor returns it, with the `return_tensors` that it is given."""
    return dict(BatchFeature(encoded, tensor_type=options.get("return_tensors")))


class _WithoutPixels(dict[str, Any]):
    """What an image processor returns, but for the pixels.

    Some processors, LLaVA's for one, count tokens by the shape of `pixel_values`: a look-up finds a tensor of that shape,
    which is no item, takes no memory and goes into no batch.
    """

    def __init__(self, encoded: Mapping[str, Any]) -> None:
        super().__init__({name: values for name, values in encoded.items() if not _is_pixels(name)})
        self.pixels = {
            name: _each(values, lambda tensor: torch.zeros(()).expand(tuple(tensor.shape)))
            for name, values in encoded.items()
            if _is_pixels(name)
        }

    def __missing__(self, name: str) -> Any:
        return self.pixels[name]


def _on_meta(image_processor: Any, images: Any, options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What an image processor returns for pictures without memory; None where that says too little."""
    if getattr(image_processor, "backend", None) != "torchvision":
        return None
    # as on the CPU, but for the resampling: Lanczos would warn, and the sizes are the same
    like_cpu = {"device": "meta", "disable_grouping": True, "resample": Image.Resampling.BILINEAR}
    pictures = _each(images, lambda array: torch.empty((3, *array.shape[:2]), dtype=torch.uint8, device="meta"))
    try:
        encoded = image_processor(pictures, **{**options, **like_cpu})
    except Exception:  # it needs values, or refuses the picture, as it will say itself of a black one
        return None
    for name, values in encoded.items():
        tensors = [value for value in flat(values) if isinstance(value, Tensor)]
        if any(0 in tensor.shape if _is_pixels(name) else tensor.is_meta for tensor in tensors):
            return None
    return encoded


def _each(values: Any, function: Callable[[Any], Any]) -> Any:
    """The function's results in the same nested lists."""
    return [_each(value, function) for value in values] if isinstance(values, list | tuple) else function(values)


def _sizes(images: Any) -> Any:
    return tuple(_sizes(image) for image in images) if isinstance(images, list | tuple) else images.shape


def _is_pixels(name: str) -> bool:
    return name.startswith("pixel_")  # pixel_values; pixel_attention_mask and pixel_mask, which go with them
