from contextlib import nullcontext

import bitsandbytes  # noqa: F401 - its operators
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlmtune.errors import ModelError
from vlmtune.planner.ledger import Event, Ledger, Outline, Where, alive, peak, to_meta


def a_ledger(scratch: int = 0) -> Ledger:
    return Ledger(lambda *_: scratch)


def sizes(ledger: Ledger) -> list[int]:
    return [event.size for event in ledger.events]


def test_a_storage_is_entered_once_and_ends_with_the_last_tensor_on_it() -> None:
    ledger = a_ledger()
    with ledger:
        tensor = torch.empty(3, 4, device="meta")
        view, part = tensor.T, tensor[1:]
        assert sizes(ledger) == [48]
        del tensor, view
        assert sizes(ledger) == [48]
        del part
    assert sizes(ledger) == [48, -48]
    assert {event.number for event in ledger.events} == {1}


def test_what_works_in_place_allocates_nothing() -> None:
    ledger = a_ledger()
    with ledger:
        tensor = torch.zeros(8, device="meta")
        tensor.add_(1).mul_(2)
        tensor[2:].zero_()
    assert sizes(ledger) == [32]


def test_temporaries_end_where_they_are_dropped() -> None:
    ledger = a_ledger()
    with ledger:
        tensor = torch.empty(256, device="meta")
        tensor = (tensor + 1).exp()
    assert sizes(ledger) == [1024, 1024, 1024, -1024, -1024]
    assert peak(ledger.events, lambda size: size) == (3072, 2)


def test_a_kernels_scratch_lies_beside_its_result() -> None:
    ledger = a_ledger(scratch=100)
    with ledger:
        torch.empty(4, device="meta")
    assert sizes(ledger) == [100, 16, -100, -16]
    assert ledger.events[0].where == Where("scratch", "", "aten::empty")


def test_an_allocation_can_turn_out_to_be_something_else() -> None:
    ledger = a_ledger()
    with ledger:
        tensor = torch.zeros(4, device="meta")
        ledger.rename(tensor, "gradients")
    assert ledger.events == [Event(1, 16, Where("gradients", "", ""))]


def test_a_ledger_begins_anew_with_what_lies_there() -> None:
    ledger = a_ledger()
    with ledger:
        kept, dropped = torch.zeros(4, device="meta"), torch.zeros(8, device="meta")
        del dropped
    assert [event.size for event in ledger.begin()] == [16]
    assert (ledger.events, ledger.kernels) == ([], 0)
    del kept
    assert [event.size for event in ledger.begin()] == []


def test_what_is_followed_by_hand_ends_too() -> None:
    ledger = a_ledger()
    tensor = torch.zeros(4, dtype=torch.int64)
    ledger.follow(tensor, Where("inputs", "", ""))
    ledger.follow(tensor[1:], Where("again", "", ""))
    del tensor
    assert ledger.events == [Event(1, 32, Where("inputs", "", "")), Event(1, -32, None)]


def test_a_real_tensor_that_is_brought_to_the_meta_device_is_not_allocated_again() -> None:
    ledger, pixels = a_ledger(), torch.zeros(8)
    ledger.follow(pixels, Where("inputs", "", ""))
    with ledger:
        there = pixels.to("meta")
        assert there.view(2, 4).is_meta
        there = pixels.to("meta", torch.bfloat16)
        del there
    assert sizes(ledger) == [32, 16, -16]


def test_peak_and_what_is_alive() -> None:
    events = [Event(1, 100, None), Event(2, 50, None), Event(1, -100, None), Event(3, 120, None)]
    assert peak(events, lambda size: size) == (170, 3)
    assert peak(events, lambda size: 512) == (1024, 1)
    assert [event.number for event in alive(events)] == [2, 3]
    assert peak([], lambda size: size) == (0, 0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False, device="meta")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden).exp()


def test_phase_and_module_of_an_allocation() -> None:
    ledger, layer = a_ledger(), Layer()
    ledger.watch(layer, "layers.0")
    ledger.follow(layer.linear.weight, Where("weights", "", ""))
    with ledger:
        result = layer(torch.zeros(2, 4, device="meta")).sum()
        result.backward()
        ledger.optimises = True
        torch.zeros(3, device="meta")
    where = [event.where for event in ledger.events if event.where]
    assert where[:2] == [Where("weights", "", ""), Where("loss", "", "aten::zeros")]
    assert where[2:4] == [Where("forward", "layers.0", "aten::mm"), Where("forward", "layers.0", "aten::exp")]
    assert Where("backward", "ExpBackward0", "aten::mul") in where
    assert where[-1] == Where("optimiser", "", "aten::zeros")


def test_a_layer_that_runs_again_is_told_from_its_first_run() -> None:
    ledger, layer = a_ledger(), Layer()
    ledger.watch(layer, "layers.0")
    with ledger:
        hidden = torch.zeros(2, 4, device="meta", requires_grad=True)
        checkpoint(layer, hidden, use_reentrant=False).sum().backward()
    again = [event.where for event in ledger.events if event.where and event.where.what == "again"]
    assert again == [Where("again", "layers.0", "aten::mm"), Where("again", "layers.0", "aten::exp")]
    with ledger:
        torch.zeros(3, device="meta")
    last = ledger.events[-2].where
    assert last == Where("loss", "", "aten::zeros")  # the second forward stops in the middle, and is left all the same


def test_a_layer_that_is_checkpointed_inside_of_its_hooks_keeps_its_name() -> None:
    ledger, layer = a_ledger(), Layer()

    class Checkpointed(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return checkpoint(layer, hidden, use_reentrant=False, context_fn=lambda: (nullcontext(), ledger.again()))

    outer = Checkpointed()
    ledger.watch(outer, "layers.0")
    with ledger:
        outer(torch.zeros(2, 4, device="meta", requires_grad=True)).sum().backward()
    again = [event.where for event in ledger.events if event.where and event.where.what == "again"]
    assert again == [Where("again", "layers.0", "aten::mm"), Where("again", "layers.0", "aten::exp")]


# ------------------------------------------------------------------------------------------------- without values


def test_real_tensors_and_those_without_memory_meet() -> None:
    with Outline():
        embedding = torch.empty(10, 4, device="meta")
        tokens = embedding[torch.tensor([[1, 2, 3]])]
        assert (tokens.shape, tokens.device.type) == ((1, 3, 4), "meta")
        assert (tokens + torch.ones(4)).is_meta
        tokens[torch.tensor([[True, False, True]])] = torch.zeros(2, 4, device="meta")


def test_integers_have_values_and_floats_have_none() -> None:
    with Outline():
        places = torch.arange(3, device="meta")
        assert places.tolist() == [0, 1, 2]
        assert torch.arange(3.0, device="meta").is_meta
        assert torch.ones(2, dtype=torch.long, device="meta").tolist() == [1, 1]
        assert torch.ones(2, device="meta").is_meta


def test_what_is_chosen_by_unknown_values_is_all_of_it() -> None:
    outline = Outline()
    with outline:
        scores = torch.empty(6, device="meta")
        assert scores[scores > 0].shape == (6,)
        assert scores.sum().item() == 0
    assert outline.assumed == {"aten::index", "aten::_local_scalar_dense"}


def test_an_operator_that_needs_values_is_named() -> None:
    with Outline(), pytest.raises(ModelError, match=r"aten::_unique2 cannot be run without values"):
        torch.unique(torch.empty(6, device="meta"))


def test_a_tensor_without_memory_keeps_shape_strides_and_dtype() -> None:
    tensor = to_meta(torch.zeros(2, 3, dtype=torch.int16).T)
    assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_meta) == ((3, 2), (1, 3), torch.int16, True)


# ----------------------------------------------------------------------------------------------------------- work


def test_the_work_of_a_linear_layer() -> None:
    ledger, layer = a_ledger(), nn.Linear(64, 32, device="meta")
    with ledger:
        layer(torch.zeros(10, 64, device="meta", requires_grad=True)).sum().backward()
    assert ledger.flops == {"matmul": 3 * 2 * 10 * 64 * 32}  # forward, to the weight, to the input


def test_the_work_of_attention() -> None:
    ledger = a_ledger()
    with ledger:
        query, key, value = (torch.zeros(2, 4, 100, 16, device="meta", dtype=torch.bfloat16) for _ in range(3))
        torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    assert ledger.flops == {"attention": 2 * 2 * 2 * (2 * 4 * 100 * 100 * 16)}


def test_the_bytes_of_elementwise_kernels() -> None:
    ledger = a_ledger()
    tensor = torch.zeros(1000, device="meta")
    with ledger:
        result = tensor + tensor
        result.view(10, 100)  # no kernel
    assert (ledger.bytes, ledger.kernels) == ({"elementwise": 12_000}, 1)


def test_the_work_of_a_product_with_packed_weights() -> None:
    ledger = a_ledger()
    packed, statistics = torch.empty(64 * 32 // 2, 1, dtype=torch.uint8, device="meta"), torch.empty(32, device="meta")
    with ledger:
        rows = torch.zeros(10, 64, device="meta", dtype=torch.bfloat16)
        torch.ops.bitsandbytes.gemm_4bit(rows, packed, [32, 64], statistics, 64, "nf4")
    assert ledger.flops == {"matmul": 2 * 10 * 64 * 32}
    assert ledger.bytes["dequantized"] == 64 * 32 * 2.5
