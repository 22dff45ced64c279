"""Whether packed rows and kept features do to this very model what they should: tried out before a run relies on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from vlmtune.collator import MultimodalCollator, PackingCollator, pictures
from vlmtune.data import Rows
from vlmtune.errors import ModelError, one_line
from vlmtune.families import Family
from vlmtune.model import attend_by_row, evaluating, kept_apart, on_device, share_prefixes_in, with_features

Row = Mapping[str, Any]
LOOKED_AT = 64  # short rows among which two with pictures are looked for
EXACT = 1e-4  # largest difference of hidden states, relative to their size; a row that is seen by another changes far more
ROUNDED = 5e-2  # the same in 16 bit, where the order of sums shows
CANNOT = (TypeError, AttributeError, ValueError, RuntimeError, KeyError, IndexError)  # what models raise at unknown inputs


def packs_tried_out(
    model: PeftModel, packing: PackingCollator, rows: Rows, lengths: Sequence[int], *, compiled: bool
) -> tuple[str, str, bool]:
    """Why rows cannot be packed, why packs cannot share what they begin with; and whether pictures may come apart from them.

    Of what can be, nothing is told.

    Args:
        model: on its device. Its attention becomes the one that keeps rows apart.
        packing: makes the packs.
        rows: of which short ones are taken.
        lengths: their tokens.
        compiled: the model will be.

    """
    try:
        attend_by_row(model)
    except ModelError as error:
        return str(error), str(error), False
    tried = _samples(packing, rows, lengths)
    unshared = "`train.torch_compile` is on, for which lengths would vary" if compiled else share_prefixes_in(model)
    if unshared:
        return packing_fault(model, packing, tried) or "", unshared, False
    sharing = replace(packing, shares=True)
    if packing.shares_pictures and packing_fault(model, replace(sharing, apart=True), tried) is None:
        return "", "", True
    unshared = packing_fault(model, sharing, tried) or ""
    return (packing_fault(model, packing, tried) or "") if unshared else "", unshared, False


def _samples(packing: PackingCollator, rows: Rows, lengths: Sequence[int]) -> Sequence[Row]:
    """Two short rows, with pictures where there are any; where pictures are shared, one more of the first's between them."""
    shortest = (rows[position] for position in sorted(range(len(lengths)), key=lengths.__getitem__))
    looked_at = list(islice(shortest, LOOKED_AT))
    seeing, texts = [one for one in looked_at if pictures(one)], [one for one in looked_at if not pictures(one)]
    if packing.shares_pictures:  # then on among longer ones
        seeing += islice(filter(pictures, shortest), max(2 - len(seeing), 0))
    first, *others = [*seeing, *texts][:2]
    return [first, _cut_short(first), *others] if packing.shares_pictures else [first, *(others or [first])]


def _cut_short(row: Row) -> Row:
    """The row with half of its last text, so that it begins like it, pictures and all."""
    *before, last = row["messages"]
    *parts, end = last["content"] or [{}]  # of a call there may be nothing else
    text = end.get("text", "").strip()
    if not text:
        return row
    return {**row, "messages": [*before, {**last, "content": [*parts, {**end, "text": text[: (len(text) + 1) // 2]}]}]}


def packing_fault(model: PeftModel, collator: PackingCollator, rows: Sequence[Row]) -> str | None:
    """What is wrong when these rows are packed: the last sees another, or one comes out other than by itself. None: nothing.

    All rows but the first are held against themselves. Where the collator shares prefixes, the rows have to have one; of a row
    that borrows much, the few tokens that are its own are looked at by themselves too.
    """
    family = collator.collator.family
    try:
        packed = collator(rows)
        if collator.shares and "unique" not in packed:
            return "the rows have no beginning in common"
        singles = [collator.collator([row]) for row in rows]
        lengths = [int(single["attention_mask"].sum()) for single in singles]
        whole = [slice(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]
        with evaluating(model):
            states = _hidden(model, family, packed)[0]
            disturbed = _hidden(model, family, _other_words(packed, whole[-1]))[0]
            alone = [
                _hidden(model, family, single)[0, :length] for single, length in zip(singles[1:], lengths[1:], strict=True)
            ]
    except torch.OutOfMemoryError:
        raise
    except CANNOT as error:
        return f"the model cannot take packed rows ({one_line(error)})"
    if _difference(states[whole[-1]], disturbed[whole[-1]]) > EXACT:
        return "one row of a pack sees another"
    own = packed.get("computed", lengths)[1 : len(rows)]
    for place, count, wanted in zip(whole[1:], own, alone, strict=True):
        found = states[place]
        if _differ(model, found, wanted) or _differ(model, found[-count:], wanted[-count:]):
            return "a packed row comes out other than by itself"
    return None


def features_fault(
    model: PeftModel, collator: MultimodalCollator, row: Row, encode: Callable[[Sequence[Any]], Sequence[Tensor]]
) -> str | None:
    """What is wrong when a row's pictures are given as features in place of pixels. None: nothing.

    Args:
        model: on its device.
        collator: opens the pictures.
        row: has at least one.
        encode: makes the features of pictures, one each.

    """
    try:
        features = encode(pictures(row))
        if len(features) != len(pictures(row)):
            return "the vision tower does not give one feature for each picture"
        with evaluating(model):
            batch = collator([row])
            plain = _hidden(model, collator.family, batch)
            bare = {name: values for name, values in batch.items() if not name.startswith("pixel_")}
            given = {**bare, "image_features": collator.family.join_features(bare, features)}
            kept = _hidden(model, collator.family, given)
    except torch.OutOfMemoryError:
        raise
    except CANNOT as error:
        return f"the model cannot take features in place of pixels ({one_line(error)})"
    return "features in place of pixels change what the model sees" if _differ(model, kept, plain) else None


def ends_apart(model: PeftModel, family: Family, batch: Mapping[str, Any], mlp: nn.Module) -> bool:
    """Whether behind this MLP no token hears of another, so that it is needed only where a token is trained on.

    Args:
        model: on its device.
        family: knows how a batch goes into the model.
        batch: of one row. The MLP's results of the first half of its tokens are turned into their opposite.
        mlp: of the model.

    """
    length = int(batch["attention_mask"].sum())
    half = length // 2

    def states(sign: int) -> Tensor:
        def turn(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output[:, :half] *= sign
            return output

        hook = mlp.register_forward_hook(turn)
        try:
            return _hidden(model, family, batch)
        finally:
            hook.remove()

    try:
        with evaluating(model):
            plain, turned = states(1), states(-1)
    except torch.OutOfMemoryError:
        raise
    except CANNOT:
        return False
    there, behind = slice(half), slice(half, length)
    return _difference(plain[:, there], turned[:, there]) > EXACT >= _difference(plain[:, behind], turned[:, behind])


def _hidden(model: PeftModel, family: Family, batch: Mapping[str, Any]) -> Tensor:
    """`[batch, seq, hidden]`, the states that the head gets."""
    core: Any = model.get_base_model().base_model
    batch = with_features(model, family, on_device(kept_apart(model, dict(batch)), model))
    inputs = family.model_inputs({name: values for name, values in batch.items() if name != "labels"})
    return core(**inputs, use_cache=False).last_hidden_state.float()


def _other_words(packed: Mapping[str, Any], last: slice) -> dict[str, Any]:
    """The pack with words exchanged in all rows but the last. Words are what is trained on.

    What the last row begins with may be computed in another: there it stays too.
    """
    ids, words = packed["input_ids"], packed["labels"][packed["labels"] >= 0]
    exchanged = torch.isin(ids, words)
    exchanged[:, last] = False
    if "unique" in packed:
        exchanged[:, packed["unique"][packed["inverse"][last]]] = False
    return {**packed, "input_ids": torch.where(exchanged, words[-1], ids)}


def _differ(model: PeftModel, values: Tensor, wanted: Tensor) -> bool:
    """Whether they differ by more than the model's rounding."""
    return _difference(values, wanted) > (EXACT if model.dtype == torch.float32 else ROUNDED)


def _difference(values: Tensor, wanted: Tensor) -> float:
    return float((values - wanted).norm() / wanted.norm().clamp(min=1e-12))
