"""Rows of stated sizes: so many tokens of text and pictures of such sizes, for a plan without data."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from vlmtune.collator import MultimodalCollator
from vlmtune.errors import RecipeError
from vlmtune.sizes import blank, without_pixels

# What may fill up a text by a token or two, where words have several tokens each.
ENDINGS = ("", ".", "a", " .", "a.", " . .")


def stated_rows(
    collator: MultimodalCollator, *, text_tokens: int, image_sizes: Sequence[tuple[int, int]], count: int
) -> list[dict[str, Any]]:
    """Equal rows of black pictures and of a text that means nothing, about two thirds of it prompt and one third answer.

    Args:
        collator: counts the tokens.
        text_tokens: tokens of a row, its chat template's among them; only those that stand for pictures are not
            (`Family.image_token_ids`, with the marks around and between them).
        image_sizes: (width, height) of the pictures of each row.
        count: how many rows.

    Returns:
        Rows `{"messages": [...], "name": "stated sizes"}`.

    Raises:
        RecipeError: so few tokens that the chat template and a word each of prompt and answer have more.
        DatasetError: pictures that the processor refuses, or any where the model takes none.

    Example:
        13 tokens of text for Llama-3.2-Vision, one picture
        → a prompt of the picture and `a`, an answer `a`: the other eleven are the chat template's

    """
    pictures = [Image.new("RGB", size) for size in image_sizes]
    smallest = collator.lengths([_row(pictures, 2)])[0]
    of_pictures = _picture_tokens(collator, _row([blank(*size) for size in image_sizes], 2)) if pictures else 0
    if text_tokens < smallest - of_pictures:
        raise RecipeError(
            f"{text_tokens} tokens of text are too few for a row: with its chat template and a word each of prompt and "
            f"answer it has at least {smallest - of_pictures}"
        )
    wanted = text_tokens + of_pictures

    def length(words: int, ending: str = "") -> int:
        return collator.lengths([_row(pictures, words, ending)])[0]

    words = bisect_right(range(text_tokens + 1), wanted, lo=2, key=length) - 1  # a word has at least one token
    for ending in ENDINGS:
        if length(words, ending) == wanted:
            return [_row(pictures, words, ending) for _ in range(count)]
    raise RecipeError(
        f"no text with exactly {text_tokens} tokens was found for this tokenizer: {length(words) - of_pictures} would do"
    )


def _row(pictures: Sequence[Any], words: int, ending: str = "") -> dict[str, Any]:
    """A row of so many words, two or more; the ending belongs to the prompt."""
    answer = max(words // 3, 1)
    prompt = {"type": "text", "text": " ".join(["a"] * (words - answer)) + ending}
    asked = [*({"type": "image", "image": picture} for picture in pictures), prompt]
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": " ".join(["a"] * answer)}]},
    ]
    return {"messages": messages, "name": "stated sizes"}


def _picture_tokens(collator: MultimodalCollator, row: Mapping[str, Any]) -> int:
    """How many tokens of a row stand for its pictures, which are blank."""
    family = collator.family
    processor = without_pixels(collator.processor, family)
    ids = family.process(processor, [row["messages"]], chat_template=collator.chat_template)["input_ids"]
    return int(torch.isin(ids, torch.tensor(sorted(family.image_token_ids(collator.processor)))).sum())
