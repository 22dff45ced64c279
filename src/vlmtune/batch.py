"""Pure tensor functions on a batch. What is trained on is decided here, and only here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # torch's cross_entropy leaves these positions out
OF_TOKENS = ("input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids")  # [batch, seq] in every family
STEADY = 128  # tokens, of which a CPU in 16 bit is given a multiple


def make_labels(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    image_token_ids: Collection[int],
    trained: Tensor | None = None,
) -> Tensor:
    """Token ids where the loss is taken, -100 elsewhere.

    Padding is told by the attention mask, never by its id: a model whose pad token is its stop token still learns to stop.

    Args:
        input_ids: `[batch, seq]`.
        attention_mask: `[batch, seq]`, 0 at padding.
        image_token_ids: ids that stand for pictures or video; never trained on.
        trained: `[batch, seq]`, true at the positions to train on; None trains on all text.

    Returns:
        `[batch, seq]`, int64.

    Example:
        ids `[7, 5, 5, 8, 9, 0]`, mask `[1, 1, 1, 1, 1, 0]`, image token 5, trained `[0, 0, 0, 0, 1, 0]`
        → `[-100, -100, -100, -100, 9, -100]`; with `trained=None` → `[7, -100, -100, 8, 9, -100]`

    """
    keep = attention_mask.bool()
    if trained is not None:
        keep = keep & trained.bool()
    if image_token_ids:
        keep = keep & ~torch.isin(input_ids, torch.tensor(sorted(image_token_ids), device=input_ids.device))
    return input_ids.masked_fill(~keep, IGNORE)


def end_at_stop_token(trained: Tensor, is_special: Tensor) -> Tensor:
    """The trained spans, each cut after its last special token: the stop token is in, what a template puts behind it is not.

    Qwen2-VL's template ends a turn with `<|im_end|>` and a newline; generation ends at `<|im_end|>`, so that the newline is
    never asked for. A span without any special token becomes empty, which the collator refuses.

    Args:
        trained: `[batch, seq]`, 1 inside the assistant turns.
        is_special: `[batch, seq]`, true at special tokens.

    Returns:
        `[batch, seq]`, bool.

    Example:
        trained `[0, 1, 1, 1, 1, 0, 1, 1]`, special `[1, 0, 0, 1, 0, 1, 0, 1]` → `[0, 1, 1, 1, 0, 0, 1, 1]`

    """
    trained, ends = trained.bool(), torch.zeros_like(trained, dtype=torch.bool)
    alive = torch.zeros_like(trained[:, 0], dtype=torch.bool)  # [batch]: a stop token lies at or right of this position
    for position in range(trained.shape[1] - 1, -1, -1):
        inside = trained[:, position]
        alive = inside & (alive | is_special[:, position])
        ends[:, position] = alive
    return ends


def flatten(batch: Mapping[str, Any], position_ids: Tensor | None = None) -> dict[str, Any]:
    """The rows of a right-padded batch one after the other, without padding.

    A row's first token is not trained on: nothing before it belongs to it, and in the padded batch no label is there either
    once labels are shifted.

    Args:
        batch: `input_ids`, `attention_mask` and `labels` of `[batch, seq]`, and whatever else a model takes.
        position_ids: `[..., batch, seq]` where a model's positions are not 0, 1, 2, …

    Returns:
        What is of `[batch, seq]` as `[1, tokens]`; `position_ids` as `[..., 1, tokens]`; `segments`, the rows' lengths, and
        the same as flash attention wants it, `cu_seq_lens_q` and `max_length_q` with their namesakes for keys. The rest as
        it was.

    Example:
        ids `[[7, 8, 9], [5, 6, 0]]`, mask `[[1, 1, 1], [1, 1, 0]]`, labels `[[7, 8, 9], [5, 6, -100]]`
        → ids `[[7, 8, 9, 5, 6]]`, labels `[[-100, 8, 9, -100, 6]]`, positions `[[0, 1, 2, 0, 1]]`, segments `[3, 2]`

    """
    keep = batch["attention_mask"].bool()
    lengths = keep.sum(1)
    packed = {name: values[keep][None] if name in OF_TOKENS else values for name, values in batch.items()}
    plain = torch.arange(keep.shape[1]).expand_as(keep)  # right-padded: a token's place is its position
    packed["position_ids"] = (plain if position_ids is None else position_ids)[..., keep][..., None, :]
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    packed["labels"] = packed["labels"].index_fill(1, borders[:-1], IGNORE)
    longest = int(lengths.max())
    flash = {"cu_seq_lens_q": borders.int(), "cu_seq_lens_k": borders.int(), "max_length_q": longest, "max_length_k": longest}
    return {**packed, **flash, "segments": lengths.tolist()}


def steady(device: torch.device, dtype: torch.dtype) -> int:
    """The number of tokens of which a batch had better have a multiple there.

    Of 16-bit matrices oneDNN compiles a kernel for each new shape, and keeps a thousand of them: `benchmarks/shapes.py`.
    https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html
    """
    return STEADY if device.type == "cpu" and dtype == torch.bfloat16 else 1


def fill_up(batch: Mapping[str, Any], multiple: int, *, pad_token_id: int) -> dict[str, Any]:
    """The batch with as many tokens behind the last that their number is a multiple, so that few shapes occur.

    They are padding: `attention_mask` is 0 and no label is there. In a packed row they are a segment of their own.

    Args:
        batch: padded or packed, as the collator makes it.
        multiple: of so many tokens; 1 leaves the batch as it is.
        pad_token_id: stands there.

    Example:
        ids `[[7, 8, 9, 5, 6]]`, labels `[[-100, 8, 9, -100, 6]]`, positions `[[0, 1, 2, 0, 1]]`, segments `[3, 2]`, multiple 8
        → ids `[[7, 8, 9, 5, 6, 0, 0, 0]]`, labels `[[-100, 8, 9, -100, 6, -100, -100, -100]]`, positions
        `[[0, 1, 2, 0, 1, 0, 1, 2]]`, segments `[3, 2, 3]`

    """
    computed = len(batch["unique"]) if "unique" in batch else batch["input_ids"].shape[1]
    extra = -computed % multiple
    if not extra:
        return dict(batch)
    values, pad = {"labels": IGNORE, "input_ids": pad_token_id}, torch.nn.functional.pad
    filled = {**batch, **{name: pad(batch[name], (0, extra), value=values.get(name, 0)) for name in OF_TOKENS if name in batch}}
    if "cross_attention_mask" in batch:  # [batch, seq, pictures, tiles]
        filled["cross_attention_mask"] = pad(batch["cross_attention_mask"], (0, 0, 0, 0, 0, extra))
    if "sights" in batch:
        filled["sights"] = [*batch["sights"], (extra, [])]
    if "position_ids" in batch:  # [..., seq]
        positions = batch["position_ids"]
        own = torch.arange(extra, device=positions.device).expand(*positions.shape[:-1], extra)
        filled["position_ids"] = torch.cat([positions, own], -1)
    if "segments" in batch:
        filled["segments"] = [*batch["segments"], extra]
        for queries in "qk":
            borders = batch[f"cu_seq_lens_{queries}"]
            filled[f"cu_seq_lens_{queries}"] = torch.cat([borders, borders[-1:] + extra])
            filled[f"max_length_{queries}"] = max(batch[f"max_length_{queries}"], extra)
    if "unique" in batch:
        behind = torch.arange(extra, device=batch["unique"].device)
        filled["unique"] = torch.cat([batch["unique"], len(batch["inverse"]) + behind])
        filled["inverse"] = torch.cat([batch["inverse"], computed + behind])
        filled["computed"] = [*batch["computed"], extra]
    return filled
