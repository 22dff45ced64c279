"""Rows that are too long, with pictures made smaller until they fit: no picture's token and no text is ever cut.

How many tokens a row has follows from the sizes of its pictures, in any family, so that a size is found and nothing decoded.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, TypeAlias

from vlmtune.collator import MultimodalCollator, pictures
from vlmtune.console import bar
from vlmtune.data import Rows, Sizes, Split, resized
from vlmtune.errors import DatasetError

Tokens: TypeAlias = dict[str, "array[int]"]  # name of a source → tokens of its rows
SMALLEST = 28  # pixels of the shorter edge, of which no picture is left fewer: a token of Qwen2-VL


def tokens_of(rows: Rows, tokens: Tokens) -> Iterator[int]:
    """The tokens of each of these rows."""
    return (tokens[rows.source][index] for index in rows.indices)


def shrink(split: Split, collator: MultimodalCollator, tokens: Tokens) -> Split:
    """The split with smaller pictures in rows that are longer than the collator's limit, as large as they fit.

    Rows that would be too long with any pictures stay as they are.

    Args:
        split: rows that the processor takes.
        collator: counts tokens, and knows the limit.
        tokens: of each row; what the shrunk ones have now is entered.

    """
    if collator.max_length is None:
        return split
    train, told = _shrink(split.train, collator, collator.max_length, tokens)
    if split.held_out is None:
        return replace(split, train=train, shrunk=told)
    held_out, also_told = _shrink(split.held_out, collator, collator.max_length, tokens)
    return replace(split, train=train, held_out=held_out, shrunk={**told, **also_told})


def _shrink(rows: Rows, collator: MultimodalCollator, limit: int, tokens: Tokens) -> tuple[Rows, dict[str, str]]:
    """The rows, and name → what was done to it, of those that were shrunk."""
    sizes: dict[int, Sizes] = {}
    told: dict[str, str] = {}
    longer = [position for position, count in enumerate(tokens_of(rows, tokens)) if count > limit]
    for position in bar(longer, "Making pictures smaller") if longer else ():
        name, index, sample = rows.name(position), rows.indices[position], rows[position]
        given = [collator.album.size(source) for source in pictures(sample)]
        fitting = _fitting(sample, given, collator, limit)
        if fitting is None:
            continue
        sizes[position] = fitting
        before, now = tokens[rows.source][index], collator.lengths([_with_sizes(sample, fitting)])[0]
        tokens[rows.source][index] = now
        changes = [f"{_size(fitting[number])} instead of {_size(given[number])}" for number in fitting]
        told[name] = f"{now:,} tokens instead of {before:,}, pictures {', '.join(dict.fromkeys(changes))}"
    return rows.shrink(sizes), told


def _fitting(
    sample: Mapping[str, Any], given: Sequence[tuple[int, int]], collator: MultimodalCollator, limit: int
) -> Sizes | None:
    """The largest sizes with which the row has at most `limit` tokens; None where there are none."""
    longest = max(map(max, given), default=1)

    def tokens(edge: int) -> float:
        """Of the row, when the longest edge of all its pictures is brought down to this."""
        try:
            return collator.lengths([_with_sizes(sample, _scaled(given, edge / longest))])[0]
        except DatasetError:  # the processor refuses such a size
            return inf

    # of 1, 2, … the last that fits, for tokens grow with it (but for rounding: now and then a larger one fits too)
    edge = bisect_right(range(1, longest), limit, key=tokens)
    return _scaled(given, edge / longest) if edge else None


def _scaled(given: Sequence[tuple[int, int]], scale: float) -> Sizes:
    """What pictures are made smaller to by the same factor; one that would be too small is left at the least size."""
    sizes: dict[int, tuple[int, int]] = {}
    for number, (width, height) in enumerate(given):
        factor = max(scale, SMALLEST / min(width, height))
        size = (round(width * factor), round(height * factor))
        if factor < 1 and size != (width, height):
            sizes[number] = size
    return sizes


def _with_sizes(sample: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    return {**sample, "messages": resized(sample["messages"], sizes)}


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
