"""Rows of a pack that begin alike: the tokens that they have in common are computed once.

A token sees itself and what stands before it. So the first tokens of two rows come out the same in every layer as long as they
are the same, and a language model need not compute them again: the keys and values of the one row serve the other.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

SEQ = {"input_ids": 1, "inputs_embeds": 1, "attention_mask": 1, "position_ids": -1, "visual_pos_masks": 1}  # that dimension


def share_prefixes(
    batch: Mapping[str, Any], *, image_token_ids: Collection[int], pictures: Sequence[Hashable]
) -> dict[str, Any]:
    """The packed batch, and which of its tokens are computed.

    A row takes what it begins with from the row before it that it has most in common with. Its last token is computed in any
    case, and so are its pictures and all behind them where the other's are not the same.

    Args:
        batch: as `batch.flatten` makes it.
        image_token_ids: ids that stand for pictures, whatever these show.
        pictures: of each row; equal where all of them are the same, in the same order.

    Returns:
        The batch. Where rows begin alike, with `unique` `[computed]`, the places of the tokens that are computed; `inverse`
        `[seq]`, which of these each token is; `computed`, how many are each row's; `cu_seq_lens_q` and `max_length_q` of these.

    Example:
        ids `[[7, 8, 9, 7, 8, 5, 6]]`, segments `[3, 4]`
        → unique `[0, 1, 2, 5, 6]`, inverse `[0, 1, 2, 0, 1, 3, 4]`, computed `[3, 2]`

    """
    ids, segments = batch["input_ids"][0], batch["segments"]
    numbers = {seen: number for number, seen in enumerate(dict.fromkeys(pictures), 1)}
    shown = torch.tensor([numbers[seen] for seen in pictures]).repeat_interleave(torch.tensor(segments))
    of_pictures = torch.isin(ids, torch.tensor(sorted(image_token_ids), dtype=ids.dtype))
    told = torch.where(of_pictures, -shown, ids)  # tells pictures apart
    places = torch.arange(len(ids))  # where each token is computed
    known: list[tuple[list[int], int]] = []  # the texts of the rows before, in order, and where these rows begin
    lengths: list[int] = []
    start = 0
    for row in told.split(segments):
        text = row[:-1].tolist()
        here = bisect_left(known, (text, start))  # between the two that it has most in common with
        alike = [(common_prefix(text, other), first) for other, first in known[max(here - 1, 0) : here + 1]]
        count, first = max(alike, default=(0, 0))
        places[start : start + count] = places[first : first + count]
        known.insert(here, (text, start))
        lengths.append(len(row) - count)
        start += len(row)
    positions = batch["position_ids"]
    if sum(lengths) == len(ids) or not torch.equal(positions[..., places], positions):
        return dict(batch)
    unique, inverse = places.unique(return_inverse=True)
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    flash = {"cu_seq_lens_q": borders, "max_length_q": max(lengths)}
    return {**batch, **flash, "unique": unique, "inverse": inverse, "computed": lengths}


def compute_once(decoder: nn.Module) -> None:
    """Has a language model leave out what `share_prefixes` says, and give its results back at every token.

    To be called once, before other hooks behind it: they see all tokens.
    """
    decoder.register_forward_pre_hook(_take_unique, with_kwargs=True)
    decoder.register_forward_hook(_give_back, with_kwargs=True)


def _take_unique(module: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    unique = inputs.get("unique")
    if unique is None:
        return args, inputs
    inputs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | inputs
    of_tokens = {name: dim for name, dim in SEQ.items() if inputs.get(name) is not None}
    for name, dim in of_tokens.items():
        if inputs[name].shape[dim] != len(inputs["inverse"]):  # a GPU would not say it before it is too late
            raise ValueError(f"`{name}` is {list(inputs[name].shape)}, and the pack has {len(inputs['inverse'])} tokens")
    taken = {name: inputs[name].index_select(dim, unique) for name, dim in of_tokens.items()}
    if inputs.get("deepstack_visual_embeds") is not None:  # [tokens of pictures, hidden] each, added in the first layers
        kept = torch.isin(inputs["visual_pos_masks"][0].nonzero().flatten(), unique)
        taken["deepstack_visual_embeds"] = [features[kept] for features in inputs["deepstack_visual_embeds"]]
    return (), inputs | taken


def _give_back(module: nn.Module, args: Any, inputs: Mapping[str, Any], output: Any) -> Any:
    if inputs.get("unique") is not None:
        output.last_hidden_state = output.last_hidden_state.index_select(1, inputs["inverse"])
    return output


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with alike.

    >>> common_prefix([7, 8, 9], [7, 8, 5, 6])
    2

    """
    both = min(len(one), len(other))
    return next((place for place in range(both) if one[place] != other[place]), both)
