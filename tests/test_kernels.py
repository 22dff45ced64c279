from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import trl.kernels.chunked_logprob as head
import trl.trainer.utils as trl_utils
from torch import Tensor
from transformers import AttentionInterface

from vlmtune.attention import IMPLEMENTATION, kernel_for
from vlmtune.planner.kernels import (
    CPU,
    CUDA,
    CUDA_BEFORE_AMPERE,
    Device,
    Kernels,
    _beside_result,
    _described,
    scratch_on,
    stand_ins,
)
from vlmtune.planner.ledger import Ledger

HALF, FULL = torch.bfloat16, torch.float32
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of a matrix of 8 × 8
    "linear": lambda x: F.linear(x, x),
    "linear with bias": lambda x: F.linear(x, x, x[0]),
    "matmul": lambda x: torch.matmul(x, x),
    "@": lambda x: x @ x,
    "mm": lambda x: x.mm(x),
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "addmm": lambda x: torch.addmm(x, x, x),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], x[None]),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "conv2d": lambda x: F.conv2d(x[None, None], x[None, None, :2, :2]),
    "conv3d": lambda x: F.conv3d(x[None, None, None], x[None, None, None, :2, :2]),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "layer_norm with weight": lambda x: F.layer_norm(x, (8,), x[0], x[0]),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x[None], 2),
    "gelu": lambda x: F.gelu(x),
    "silu": lambda x: F.silu(x),
    "exp": lambda x: torch.exp(x),
    "pow": lambda x: x.pow(2),
    "**": lambda x: x**2,
    "rsqrt": lambda x: torch.rsqrt(x),
    "sum": lambda x: x.sum(),
    "prod": lambda x: x.prod(),
    "mean": lambda x: x.mean(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "norm": lambda x: torch.norm(x),
    "cdist": lambda x: torch.cdist(x, x),
    "mse_loss": lambda x: F.mse_loss(x, x),
    "l1_loss": lambda x: F.l1_loss(x, x),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros(8, dtype=torch.long)),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x),
    "add": lambda x: x + x,
    "cat": lambda x: torch.cat([x, x]),
    "dropout": lambda x: F.dropout(x),
}
IN_32_BIT_ON_CUDA = {  # https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32
    "softmax", "log_softmax", "layer_norm", "layer_norm with weight", "group_norm", "exp", "pow", "**", "rsqrt", "sum", "prod",
    "cumsum", "norm", "cdist", "mse_loss", "l1_loss", "cross_entropy", "cosine_similarity",
}  # fmt: skip
IN_16_BIT_ON_CUDA = {"linear", "linear with bias", "matmul", "@", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv2d", "conv3d"}
IN_16_BIT_ON_CUDA |= {"attention"}


def played(function: Callable[[], Any], device: Device = CUDA) -> tuple[Any, Ledger]:
    """What a function returns while a device is played, and a ledger of it."""
    kernels, ledger = Kernels(device), Ledger(scratch_on(device))
    with stand_ins(kernels), ledger, kernels:
        return function(), ledger


def meta(*shape: int, dtype: torch.dtype = HALF, trained: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=trained)


# --------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_computes_in_the_dtype_of_the_real_one_on_a_cpu(name: str, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", HALF):
        real = FUNCTIONS[name](torch.rand(8, 8, dtype=dtype))
        simulated, _ = played(lambda: FUNCTIONS[name](meta(8, 8, dtype=dtype)), CPU)
    assert (simulated.dtype, simulated.shape) == (real.dtype, real.shape)


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_computes_on_a_gpu_as_pytorch_documents(name: str, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", HALF):
        simulated, _ = played(lambda: FUNCTIONS[name](meta(8, 8, dtype=dtype)), CUDA)
    expected = HALF if name in IN_16_BIT_ON_CUDA else FULL if name in IN_32_BIT_ON_CUDA else dtype
    assert simulated.dtype == expected


def test_nothing_is_cast_without_autocast() -> None:
    assert played(lambda: F.linear(meta(8, 8, dtype=FULL), meta(8, 8, dtype=FULL)))[0].dtype == FULL
    assert played(lambda: F.softmax(meta(8, 8), -1))[0].dtype == HALF


def test_a_trained_weight_is_cast_once_until_the_outermost_autocast_ends() -> None:
    weight = meta(8, 8, dtype=FULL, trained=True)

    def run() -> None:
        with torch.autocast("cpu", HALF):
            with torch.autocast("cpu", HALF):
                F.linear(meta(2, 8), weight)
            F.linear(meta(2, 8), weight)
        F.linear(meta(2, 8), meta(8, 8))

    _, ledger = played(run)
    casts = [number for number, event in enumerate(ledger.events) if event.where and event.where.operator == "aten::_to_copy"]
    assert len(casts) == 1
    cast = ledger.events[casts[0]]
    assert cast.size == 8 * 8 * 2
    ends = [number for number, event in enumerate(ledger.events) if event.number == cast.number and event.size < 0]
    products = [number for number, event in enumerate(ledger.events) if event.where and event.where.operator == "aten::mm"]
    assert len(products) == 3
    assert products[1] < ends[0] < products[2]


# -------------------------------------------------------------------------------------------------------- attention


def attend(device: Device, *, dtype: torch.dtype = HALF, width: int = 64, key_heads: int = 4, mask: bool = False) -> Ledger:
    query, key, value = meta(2, 4, 100, width, dtype=dtype), *(meta(2, key_heads, 100, width, dtype=dtype) for _ in range(2))
    shown = torch.ones(2, 1, 100, 100, dtype=torch.bool) if mask else None

    def run() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, shown, enable_gqa=key_heads != 4)

    output, ledger = played(run, device)
    assert (output.shape, output.dtype) == ((2, 4, 100, width), dtype)
    return ledger


FLASH, EFFICIENT, ON_CPU = (
    f"aten::_scaled_dot_product_{name}" for name in ("flash_attention", "efficient_attention", "flash_attention_for_cpu")
)


@pytest.mark.parametrize(
    ("kernel", "device", "options"),
    [
        (FLASH, CUDA, {}),
        (FLASH, CUDA, {"width": 20}),  # widths are filled up to a multiple of 8
        (FLASH, CUDA, {"key_heads": 2}),
        (EFFICIENT, CUDA, {"mask": True}),
        (EFFICIENT, CUDA, {"dtype": FULL}),
        (EFFICIENT, CUDA, {"width": 320}),
        (EFFICIENT, CUDA_BEFORE_AMPERE, {}),
        (EFFICIENT, CUDA_BEFORE_AMPERE, {"key_heads": 1, "mask": True}),
        (ON_CPU, CPU, {}),
        (ON_CPU, CPU, {"key_heads": 2, "mask": True, "dtype": FULL}),
    ],
)
def test_attention_is_computed_by_the_kernel_that_the_device_would_take(
    kernel: str, device: Device, options: dict[str, Any]
) -> None:
    assert [name for name in attend(device, **options).operators if "_scaled_dot_product" in name] == [kernel]


def test_memory_efficient_attention_copies_keys_that_heads_share() -> None:
    repeated = [event.size for event in attend(CUDA, key_heads=2, dtype=FULL).events if event.size == 2 * 4 * 100 * 64 * 4]
    assert len(repeated) >= 3  # keys, values, the result


def test_packed_rows_are_attended_to_by_the_kernel_of_the_device() -> None:
    half, full = meta(1, 4, 100, 64), meta(1, 4, 100, 64, dtype=FULL)
    assert [Kernels(device).kernel_for(half) for device in (CUDA, CUDA_BEFORE_AMPERE, CPU)] == ["varlen", "sdpa", "written out"]
    assert [Kernels(device).kernel_for(full) for device in (CUDA, CUDA_BEFORE_AMPERE, CPU)] == ["sdpa", "sdpa", "sdpa"]
    real = torch.zeros(1, 4, 100, 64)
    assert [Kernels(CPU).kernel_for(tensor) for tensor in (real, real.to(HALF))] == [
        kernel_for(tensor) for tensor in (real, real.to(HALF))
    ]


# ---------------------------------------------------------------------------------------------- dropout, scratch, head


def test_dropout_on_a_gpu_keeps_a_byte_for_each_number() -> None:
    _, ledger = played(lambda: F.dropout(meta(1000, trained=True), 0.1))
    assert sorted(event.size for event in ledger.events if event.size > 0) == [1000, 2000, 2000]  # mask, input, result
    _, ledger = played(lambda: F.dropout(meta(1000, trained=True), 0.1, training=False))
    assert [event.size for event in ledger.events if event.size > 0] == [2000]  # the input


def test_scratch_of_a_product_with_packed_weights() -> None:
    weights, statistics = meta(64 * 32 // 2, 1), meta(32, dtype=FULL)
    rows = meta(10, 64)
    plain = (rows, weights, [32, 64], statistics, 64, "nf4")
    assert scratch_on(CUDA)("bitsandbytes::gemm_4bit", plain) == 32 * 64 * 2
    nested = (*plain, None, meta(32, dtype=FULL), statistics, statistics)
    assert scratch_on(CUDA)("bitsandbytes::gemm_4bit", nested) == 32 * 64 * 2 + 32 * 4
    assert scratch_on(CPU)("bitsandbytes::gemm_4bit", nested) >= 32 * 64 * 2 + 32 * 4
    assert scratch_on(CUDA)("aten::mm", (rows, rows.T)) == 0


def test_scratch_of_flash_attention_backward_is_sums_in_32_bit() -> None:
    query, shared = meta(2, 4, 100, 64), meta(2, 2, 100, 64)
    name, sums = "aten::_scaled_dot_product_flash_attention_backward", 2 * 4 * 128 * (64 + 1) * 4
    assert scratch_on(CUDA)(name, (query, query, query)) == sums
    assert scratch_on(CUDA)(name, (query, query, shared)) == sums + 2 * 2 * 4 * 100 * 64 * 2


def test_what_a_function_allocates_beside_its_result_is_measured() -> None:
    assert _beside_result(lambda tensor: tensor.exp().neg(), _described((torch.zeros(256),))) == 1024
    assert _beside_result(lambda tensor: tensor.exp(), _described((torch.zeros(256),))) == 0
    assert scratch_on(CPU)("aten::mm", (torch.zeros(8, 8), torch.zeros(8, 8))) == 0  # MKL's


def head_of(device: Device) -> tuple[list[int], Ledger]:
    """Sizes of all that TRL's head allocates for 100 positions and 5000 tokens, forward and backward."""
    hidden, weight = meta(100, 64, trained=True), meta(5000, 64)
    targets = torch.zeros(100, dtype=torch.long)

    def run() -> None:
        outputs = head.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 5000, None, 1.0, ("entropy", "is_top1"))
        outputs[0].sum().backward()

    _, ledger = played(run, device)
    known = {hidden.untyped_storage().nbytes(), weight.untyped_storage().nbytes()}
    return [event.size for event in ledger.events if event.size > 0 and event.size not in known], ledger


def test_trls_head_on_a_gpu_needs_no_logits_in_32_bit() -> None:
    on_gpu, ledger = head_of(CUDA)
    on_cpu, _ = head_of(CPU)
    assert max(on_gpu) == 100 * 5000 * 2  # the buffer for a tile of the logits
    assert on_gpu.count(100 * 5000 * 2) == 2  # forward and backward
    assert on_cpu.count(100 * 5000 * 4) > 5
    assert ledger.flops["matmul"] == 3 * 2 * 100 * 5000 * 64  # the tile, the tile again, its gradient


# ------------------------------------------------------------------------------------------------------- stand-ins


@dataclass(frozen=True)
class Found:
    functions: tuple[Any, ...]

    @classmethod
    def now(cls) -> "Found":
        return cls(
            (
                torch.is_autocast_enabled,
                torch.get_autocast_dtype,
                torch.clear_autocast_cache,
                torch.get_rng_state,
                import_module("torch.optim.adam")._device_dtype_check_for_fused,
                head._use_triton,
                trl_utils._use_triton,
                head._forward_kernel,
                head._backward_kernel,
                head._addmm_fp32,
                AttentionInterface()[IMPLEMENTATION],
            )
        )


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.name)
def test_torch_and_trl_are_left_as_they_were(device: Device) -> None:
    before = Found.now()

    def fail() -> None:
        assert Found.now() != before
        raise KeyError

    with pytest.raises(KeyError):
        played(fail, device)
    assert Found.now() == before
