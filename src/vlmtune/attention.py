"""Attention over packed rows, each row by itself: no mask over the pack, and no row that sees another.

`IMPLEMENTATION` is a name for transformers' `attn_implementation`, and `OF_PICTURES` one for that of a vision tower.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

IMPLEMENTATION = "vlmtune"
OF_PICTURES = "vlmtune_pictures"
SHORT = 768  # tokens of a row whose scores, 768 × 768 of each head, a CPU has room for: 33 MB in a layer of 28 heads
BLOCK = 256  # tokens whose scores fit its cache
AT_ONCE = 2**26  # scores of a block that nothing is kept of: 128 MiB
GRAIN = 64  # rows are filled up to a multiple of so many tokens: see `batch.fill_up`
SPECIAL = ("dropout", "softcap", "s_aux", "position_bias", "cache")  # options that only transformers' own functions know
Sight: TypeAlias = tuple[int, Sequence[tuple[int, int]]]  # so many tokens see the tiles from the one to the other
Kernel: TypeAlias = Literal["varlen", "written out", "sdpa"]


def kernel_for(query: Tensor) -> Kernel:
    """The fastest that this tensor's device has for rows of a pack: one call for all of them, products of matrices, or SDPA."""
    if query.is_cuda and takes_varlen(query) and torch.cuda.get_device_capability(query.device) >= (8, 0):
        return "varlen"
    return "written out" if query.device.type == "cpu" and query.dtype == torch.bfloat16 else "sdpa"


def takes_varlen(query: Tensor) -> bool:
    """Whether torch's own FlashAttention, of Ampere cards and newer, takes rows like these."""
    half, width = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    return varlen_attn is not None and half and width <= 256 and width % 8 == 0


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[int] | None = None,
    sights: Sequence[Sight] | None = None,
    tiles: int = 0,
    inverse: Tensor | None = None,
    computed: Sequence[int] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    kernel: Callable[[Tensor], Kernel] = kernel_for,
    **options: Any,
) -> tuple[Tensor, None]:
    """Self-attention of each row of a pack by itself, or cross-attention of each row to its own pictures.

    Args:
        module: the attention layer; where `sights` are given, one without a true `is_causal` looks at pictures.
        query: `[1, heads, seq, head_dim]`.
        key: `[1, key_heads, seq, head_dim]`, or of pictures `[1, key_heads, tiles * patches, head_dim]`.
        value: like `key`.
        attention_mask: `[1, 1, seq, seq]` where a layer has a sliding window longer rows reach over, else None.
        segments: the rows' lengths, which sum up to seq; None where the batch is not packed.
        sights: of cross-attention, which tokens see which tiles; together they are all tokens.
        tiles: of all pictures in the pack.
        inverse: `[keys]`, where rows begin alike: which of the seq tokens each of the rows' tokens is (`prefixes`).
        computed: how many of each row's last tokens are among the seq; `segments` sum up to keys then.
        cu_seq_lens_q: `[rows + 1]`, int32, the rows' borders among the queries, for kernels that take them.
        cu_seq_lens_k: the same among the keys.
        max_length_q: most queries of a row.
        max_length_k: most keys.
        kernel: what to compute self-attention with.
        options: `dropout`, `scaling` and what else transformers passes on.

    Returns:
        `[1, seq, heads, head_dim]`, and no weights.

    """
    if segments is None:
        return plain_attention(module, query, key, value, attention_mask, kernel=kernel, **options)
    looks = None if getattr(module, "is_causal", False) else sights  # which stand in the place of a mask
    plain = (looks is not None or attention_mask is None) and not _is_special(options)
    chosen = kernel(query) if plain else "sdpa"
    if looks is not None:
        return _look(module, query, key, value, looks, key.shape[2] // max(tiles, 1), chosen, options), None
    if inverse is not None:
        if attention_mask is not None:
            raise ValueError("rows that share prefixes are told apart by their lengths, and a mask is given")
        key, value = (_repeated(tensor, inverse) for tensor in (key, value))
    if chosen == "varlen":
        assert cu_seq_lens_q is not None
        assert cu_seq_lens_k is not None
        return _varlen(query, key, value, (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k), options), None
    outputs: list[Tensor] = []
    start = 0
    rows = (query.split(list(computed or segments), dim=2), *(tensor.split(list(segments), dim=2) for tensor in (key, value)))
    for asked, keys, values in zip(*rows, strict=True):
        stop = start + asked.shape[2]
        mask = attention_mask[..., start:stop, start:stop] if attention_mask is not None else None
        outputs.append(_attend(module, asked, keys, values, mask, chosen, options, before=keys.shape[2] - asked.shape[2]))
        start = stop
    return torch.cat(outputs, dim=1), None


def _repeated(tensor: Tensor, inverse: Tensor) -> Tensor:
    """`[1, heads, seq, head_dim]` → `[1, heads, keys, head_dim]`; by tokens, as a projection leaves them in memory."""
    return tensor.transpose(1, 2).index_select(1, inverse).transpose(1, 2)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: Callable[[Tensor], Kernel] = kernel_for,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of patches, or of padded rows: transformers' SDPA, or on a CPU what is faster.

    Args:
        module: the attention layer.
        query: `[batch, heads, seq, head_dim]`.
        key: `[batch, key_heads, keys, head_dim]`.
        value: like `key`.
        attention_mask: `[batch, 1 or heads, seq, keys]`, true where seen or to be added to scores.
        kernel: what to compute it with.
        options: `dropout`, `scaling` and what else transformers passes on.

    Returns:
        `[batch, seq, heads, head_dim]`, and no weights.

    """
    chosen = "sdpa" if _is_special(options) else kernel(query)
    return _attend(module, query, key, value, attention_mask, chosen, options), None


def _is_special(options: dict[str, Any]) -> bool:
    return any(isinstance(options.get(name), Tensor) or bool(options.get(name)) for name in SPECIAL)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kernel: Kernel,
    options: dict[str, Any],
    *,
    before: int = 0,
) -> Tensor:
    """`[batch, seq, heads, head_dim]`. So many keys stand `before` the first query's own, and all queries see them."""
    asked = options.get("is_causal")
    causal: bool = mask is None and (getattr(module, "is_causal", True) if asked is None else asked)
    size = (query.shape[2], key.shape[2])
    known = size[0] + before == size[1] if causal else mask is None or (mask.ndim == 4 and mask.shape[2:] == size)
    if kernel != "written out" or size[0] == 1 or not known or not _has_room(query, key, value):
        query = nn.functional.pad(query, (0, 0, before, 0)) if before else query  # to be square, by which it needs no mask
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0][:, before:]
    return _written_out(query, key, value, mask, causal=causal, before=before, scaling=options.get("scaling"))


def _has_room(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a row's scores may be kept for the backward pass. Where there is none, they are gone block by block."""
    batch, heads, tokens, _ = query.shape
    if any(tensor.requires_grad for tensor in (query, key, value)):
        return (tokens + -tokens % GRAIN) * key.shape[2] <= SHORT**2
    return batch * heads * min(tokens, BLOCK) * key.shape[2] <= AT_ONCE


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, before: int, scaling: float | None
) -> Tensor:
    """Attention by matrix products: on a CPU in bfloat16 faster than torch's kernel, at the price of memory.

    Query heads that share a key head go below each other. Keys behind the last that a block of queries sees are left out.
    `benchmarks/attention.py` has the figures.
    """
    tokens, there = query.shape[2], key.shape[2]
    query, key, value = map(_filled, (query, key, value))
    batch, heads, length, width = query.shape
    groups, shared = batch * key.shape[1], heads // key.shape[1]
    keys, values = (tensor.reshape(groups, -1, tensor.shape[-1]) for tensor in (key, value))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    outputs: list[Tensor] = []
    for start, block in zip(range(0, length, BLOCK), query.split(BLOCK, dim=2), strict=True):
        count = block.shape[2]
        seen, added = key.shape[2], None  # keys, and what is added to their scores
        if causal:
            stop = before + start + count
            seen = min(stop + -stop % GRAIN, seen)
            added = query.new_full((count, seen), float("-inf")).triu_(before + start + 1).repeat(shared, 1)
        elif mask is not None:
            seen, added = _masked(mask[:, :, start : start + count], there, count)
            added = added.expand(batch, heads, count, seen).reshape(groups, -1, seen) if added is not None else None
        elif there < seen:
            added = _behind(query.new_zeros(1, there), seen)
        asked = block.reshape(groups, -1, width)  # [groups, shared * block, width]
        base, beta = (added, 1) if added is not None else (query.new_zeros(1), 0)
        scores = torch.baddbmm(base, asked, keys[:, :seen].transpose(1, 2), beta=beta, alpha=scaling or width**-0.5)
        found = torch.bmm(torch.softmax(scores, -1), values[:, :seen])
        outputs.append(found.reshape(batch, heads, count, value.shape[-1]))
    return torch.cat(outputs, dim=2)[:, :, :tokens].transpose(1, 2)


def _masked(mask: Tensor, there: int, count: int) -> tuple[int, Tensor | None]:
    """How many keys some query of a block sees, counted from the first, and what hides others of these, if anything does.

    Args:
        mask: `[batch, 1 or heads, queries, keys]`, to be added to scores. A query that sees nothing is to have some result, not
            NaN.
        there: how many keys there are; those behind fill up.
        count: how many queries the block has, those among them that fill it up.

    """
    seen = there
    if not mask.is_meta:  # a plan knows no values
        highest = mask.amax(2).amax((0, 1))  # in one go a CPU takes twenty times as long
        places = (highest > torch.finfo(mask.dtype).min).nonzero()
        seen = int(places[-1]) + 1 if len(places) else there
        whole = seen + -seen % GRAIN
        if whole <= there and not highest[:whole].any() and not mask[..., :seen].amin():
            return whole, None
    mask, seen = mask[..., :seen], seen + -seen % GRAIN
    return seen, nn.functional.pad(_behind(mask, seen), (0, 0, 0, count - mask.shape[2]))


def _behind(added: Tensor, keys: int) -> Tensor:
    """`[..., seen]` → `[..., keys]`, of which those behind are not seen."""
    return nn.functional.pad(added, (0, keys - added.shape[-1]), value=float("-inf"))


def _filled(tensor: Tensor) -> Tensor:
    """`[batch, heads, seq, head_dim]` with zeros behind, as many as make seq a multiple."""
    extra = -tensor.shape[2] % GRAIN
    return nn.functional.pad(tensor, (0, 0, 0, extra)) if extra else tensor


def _look(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sights: Sequence[Sight],
    patches: int,
    kernel: Kernel,
    options: dict[str, Any],
) -> Tensor:
    """Cross-attention without a mask: tokens that see the same tiles go together. Tokens without pictures get zeros."""
    outputs: list[Tensor] = []
    start = 0
    for count, ranges in sights:
        asked = query[:, :, start : start + count]
        start += count
        if not ranges:
            outputs.append(torch.zeros_like(asked).transpose(1, 2))
            continue
        keys, values = (
            torch.cat([tensor[:, :, first * patches : last * patches] for first, last in ranges], dim=2)
            for tensor in (key, value)
        )
        outputs.append(_attend(module, asked, keys, values, None, kernel, {**options, "is_causal": False}))
    return torch.cat(outputs, dim=1)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    options: dict[str, Any],
) -> Tensor:
    """One kernel for all rows; of queries and keys that are not equally many the last ones stand at the same place.

    https://docs.pytorch.org/docs/stable/nn.attention.varlen.html
    """
    asked, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [seq, heads, head_dim]
    assert varlen_attn is not None
    kernel = partial(varlen_attn, scale=options.get("scaling"), window_size=(-1, 0), enable_gqa=True)  # causal
    output = kernel(asked, keys, values, *borders, *longest)
    assert isinstance(output, Tensor)
    return output[None]


def register(kernel: Callable[[Tensor], Kernel] | None = None) -> None:
    """Makes both known to transformers, or with another device's way to tell which kernel a tensor goes through."""
    for name, function in ((IMPLEMENTATION, packed_attention), (OF_PICTURES, plain_attention)):
        AttentionInterface.register(name, partial(function, kernel=kernel) if kernel is not None else function)


register()
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)  # batches that are not packed are masked as ever
AttentionMaskInterface.register(OF_PICTURES, sdpa_mask)
