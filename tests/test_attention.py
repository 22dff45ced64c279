"""Packed attention gives each row what it gets by itself, on every device and by every kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlmtune.attention import AT_ONCE, BLOCK, GRAIN, SHORT, packed_attention, plain_attention

ROWS = (5, 300, 1, 64, 900)  # written out in blocks, and longer than is written out
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def layer(*, causal: bool = True) -> nn.Module:
    module = nn.Module()
    if causal:
        module.is_causal = True
    module.num_key_value_groups = 2
    return module


def tensors(length: int, dtype: torch.dtype, device: str, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((1, 4, length, 16), (1, 2, keys or length, 16), (1, 2, keys or length, 16))
    query, key, value = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
    return query, key, value


def row_by_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What SDPA makes of each row in float32."""
    parts = zip(*(tensor.detach().float().split(ROWS, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(layer(), *part, None, scaling=0.25)[0] for part in parts], dim=1)


def packed(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    borders = torch.tensor([0, *ROWS], device=query.device).cumsum(0).int()
    return packed_attention(
        layer(),
        query,
        key,
        value,
        None,
        segments=ROWS,
        cu_seq_lens_q=borders,
        max_length_q=max(ROWS),
        scaling=0.25,
        **options,  # pyright: ignore
    )[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_each_row_gets_what_it_gets_by_itself(device: str, dtype: torch.dtype, close: float) -> None:
    inputs = tensors(sum(ROWS), dtype, device)
    assert (packed(*inputs).float() - row_by_row(*inputs)).abs().max() <= close


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_in_bfloat16_are_those_in_float32(device: str) -> None:
    short, exact = tensors(sum(ROWS), torch.bfloat16, device), tensors(sum(ROWS), torch.float32, device)
    packed(*short).float().square().sum().backward()
    packed(*exact).square().sum().backward()
    for rounded, wanted in zip(short, exact, strict=True):
        assert rounded.grad is not None
        assert wanted.grad is not None
        assert (rounded.grad.float() - wanted.grad).norm() <= 3e-2 * wanted.grad.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_hear_of_another(device: str) -> None:
    query, key, value = tensors(sum(ROWS), torch.bfloat16, device)
    before = packed(query, key, value)[:, ROWS[0] : ROWS[0] + ROWS[1]]
    changed = value.detach().clone()
    changed[:, :, : ROWS[0]] += 1
    changed[:, :, ROWS[0] + ROWS[1] :] += 1
    assert torch.equal(packed(query, key, changed)[:, ROWS[0] : ROWS[0] + ROWS[1]], before)


def test_rows_of_nearly_one_length_are_products_of_the_same_shapes() -> None:
    """Of each new shape oneDNN compiles kernels."""
    shapes: list[set[str]] = []
    for length in (300, 311):
        query, key, value = tensors(length, torch.bfloat16, "cpu")
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorder:
            packed_attention(layer(), query, key, value, None, segments=[length], scaling=0.25)[0].float().sum().backward()
        events = recorder.key_averages(group_by_input_shape=True)
        shapes.append({str(event.input_shapes) for event in events if event.key in ("aten::bmm", "aten::baddbmm")})
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) >= 6


def test_options_that_only_transformers_knows_go_to_transformers() -> None:
    inputs = tensors(sum(ROWS), torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="softcap"):
        packed(*inputs, softcap=30.0)


def test_looks_are_written_out_where_there_is_room_for_their_scores() -> None:
    for patches, written in ((5, True), (SHORT * SHORT // 64, True), (SHORT * SHORT // 64 + 1, False)):
        query, key, value = tensors(5, torch.bfloat16, "cpu", keys=patches)
        with profile(activities=[ProfilerActivity.CPU]) as recorder:
            packed_attention(layer(causal=False), query, key, value, None, segments=[5], sights=[(5, [(0, 1)])], tiles=1)
        assert any(event.key == "aten::baddbmm" for event in recorder.key_averages()) == written


@pytest.mark.parametrize("patches", [2, 5000])  # 5000: more scores than there is room for
@pytest.mark.parametrize("device", DEVICES)
def test_looking_in_bfloat16_has_the_results_and_gradients_of_float32(device: str, patches: int) -> None:
    sights = [(300, [(0, 1), (2, 3)]), (70, [(1, 2)]), (3, [])]
    found: list[list[Tensor]] = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = tensors(373, dtype, device, keys=3 * patches)
        seen = packed_attention(
            layer(causal=False), *inputs, None, segments=[370, 3], sights=sights, tiles=3, scaling=0.25, is_causal=False
        )[0]
        gradients = torch.autograd.grad(seen.float().square().sum(), inputs)
        found.append([seen.detach().float(), *(gradient.float() for gradient in gradients)])
    for rounded, wanted in zip(*found, strict=True):
        assert (rounded - wanted).norm() <= 3e-2 * wanted.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_look_at_their_own_tiles_and_those_without_at_none(device: str) -> None:
    query, key, value = tensors(6, torch.float32, device, keys=8)  # four tiles of two patches
    seen = packed_attention(
        layer(causal=False),
        query,
        key,
        value,
        None,
        segments=[4, 2],
        sights=[(2, [(0, 1), (3, 4)]), (2, [(1, 2)]), (2, [])],
        tiles=4,
        scaling=0.25,
    )[0]
    apart = torch.tensor([0, 1, 6, 7], device=device)
    first = sdpa_attention_forward(
        layer(), query[:, :, :2], key[:, :, apart], value[:, :, apart], None, scaling=0.25, is_causal=False
    )[0]
    second = sdpa_attention_forward(
        layer(), query[:, :, 2:4], key[:, :, 2:4], value[:, :, 2:4], None, scaling=0.25, is_causal=False
    )[0]
    assert torch.allclose(seen[:, :2], first, atol=1e-6)
    assert torch.allclose(seen[:, 2:4], second, atol=1e-6)
    assert not seen[:, 4:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seeing", ["all", "added", "added for each head", "true or false"])
@pytest.mark.parametrize(("batch", "patches", "keys"), [(1, 300, 300), (2, 70, 333), (1, 2, GRAIN)])
def test_pictures_in_bfloat16_get_what_they_get_in_float32(
    device: str, seeing: str, batch: int, patches: int, keys: int
) -> None:
    torch.manual_seed(0)
    shapes = ((batch, 4, patches, 16), (batch, 2, keys, 16), (batch, 2, keys, 16))
    query, key, value = (torch.randn(shape, device=device) for shape in shapes)
    seen = torch.rand(batch, 4 if seeing == "added for each head" else 1, patches, keys, device=device) > 0.3
    seen[..., 0] = True
    mask = None if seeing == "all" else seen if seeing == "true or false" else torch.where(seen, 0.0, -1e9)
    wanted = sdpa_attention_forward(layer(causal=False), query, key, value, mask, scaling=0.25, is_causal=False)[0]
    half = mask.bfloat16() if mask is not None and mask.dtype != torch.bool else mask
    rounded = (tensor.bfloat16() for tensor in (query, key, value))
    found = plain_attention(layer(causal=False), *rounded, half, scaling=0.25, is_causal=False)[0]
    assert (found.float() - wanted).abs().max() <= 3e-2


@pytest.mark.parametrize("hidden", [torch.finfo(torch.bfloat16).min, float("-inf")])
def test_keys_that_no_patch_of_a_block_sees_are_left_out(hidden: float) -> None:
    """As in Llama-3.2-Vision: tiles that fill a picture up see the others, and not themselves."""
    real, tokens = torch.tensor([300, 200]), 3 * BLOCK + 100
    query, key, value = (torch.randn(2, heads, tokens, 16) for heads in (4, 2, 2))
    filler = (torch.arange(tokens) >= real[:, None])[:, None]  # [batch, 1, tokens]
    mask = torch.where(filler[..., None] & filler[..., None, :], hidden, 0.0)
    wanted = sdpa_attention_forward(layer(causal=False), query, key, value, mask, scaling=0.25, is_causal=False)[0]
    rounded = [tensor.bfloat16() for tensor in (query, key, value)]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorder:
        found = plain_attention(layer(causal=False), *rounded, mask.bfloat16(), scaling=0.25, is_causal=False)[0]
    assert (found.float() - wanted).abs().max() <= 3e-2
    events = [event for event in recorder.key_averages(group_by_input_shape=True) if event.key == "aten::baddbmm"]
    widths = sorted(event.input_shapes[2][-1] for event in events for _ in range(event.count))
    assert widths == [320] * 2 + [tokens + -tokens % GRAIN] * 2  # of four blocks: the first two have patches that see all


def test_a_patch_that_sees_nothing_gets_some_result() -> None:
    query, key, value = (tensor.detach() for tensor in tensors(70, torch.bfloat16, "cpu"))
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool)
    mask[:, :, 3] = False
    assert plain_attention(layer(causal=False), query, key, value, mask)[0].isfinite().all()


def is_written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: object) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as recorder:
        plain_attention(layer(causal=False), query, key, value, mask, **options)  # pyright: ignore
    return any(event.key == "aten::baddbmm" for event in recorder.key_averages())


def test_pictures_are_written_out_on_a_cpu_in_16_bit_where_there_is_room_or_nothing_is_kept() -> None:
    none = {"is_causal": False}
    long = tensors(SHORT + 1, torch.bfloat16, "cpu")
    frozen = tuple(tensor.detach() for tensor in long)
    assert is_written_out(*frozen, **none)
    assert not is_written_out(*long, **none)
    assert is_written_out(*tensors(SHORT, torch.bfloat16, "cpu"), **none)
    assert not is_written_out(*tensors(SHORT, torch.float32, "cpu"), **none)
    assert not is_written_out(*frozen, **none, dropout=0.1)
    assert not is_written_out(*frozen, **none, position_bias=torch.zeros(1, 4, SHORT + 1, SHORT + 1))
    assert not is_written_out(*frozen, torch.zeros(4, SHORT + 1, SHORT + 1, dtype=torch.bfloat16))
    assert not is_written_out(frozen[0][:, :, :1], *frozen[1:], **none)
    assert not is_written_out(*frozen[:2], long[2], **none)  # a value that is trained has the scores kept as well


def test_many_rows_whose_scores_would_fill_the_memory_go_through_the_kernel() -> None:
    rows = AT_ONCE // (4 * BLOCK * (SHORT + 1))
    one = [tensor.detach() for tensor in tensors(SHORT + 1, torch.bfloat16, "cpu")]
    few, many = ([tensor.expand(count, -1, -1, -1) for tensor in one] for count in (2, rows + 1))
    assert is_written_out(*few, is_causal=False)
    assert not is_written_out(*many, is_causal=False)


def test_padded_rows_that_look_back_only_are_written_out_too() -> None:
    query, key, value = tensors(300, torch.bfloat16, "cpu")
    found = plain_attention(layer(), query, key, value, None, scaling=0.25)[0]
    wanted = sdpa_attention_forward(layer(), *(tensor.float() for tensor in (query, key, value)), None, scaling=0.25)[0]
    assert (found.float() - wanted).abs().max() <= 3e-2
    assert is_written_out(query, key, value)


@pytest.mark.parametrize("causal", [True, False])
def test_the_caller_says_whether_it_looks_back_only_and_values_may_have_another_width(causal: bool) -> None:
    query, key, _ = (tensor.detach() for tensor in tensors(70, torch.bfloat16, "cpu"))
    value = torch.randn(1, 2, 70, 24).bfloat16()
    module = layer()
    module.is_causal = not causal  # pyright: ignore
    found = plain_attention(module, query, key, value, None, is_causal=causal)[0]
    exact = (tensor.float() for tensor in (query, key, value))
    wanted = sdpa_attention_forward(module, *exact, None, is_causal=causal)[0]
    assert found.shape == wanted.shape == (1, 70, 4, 24)
    assert (found.float() - wanted).abs().max() <= 3e-2
