"""What a device would do with operators that run on the meta device: its autocast, its attention kernels, their scratch.

On the meta device torch chooses no kernel: attention falls apart into products of matrices, autocast casts nothing. `Kernels`
chooses as the device would, so that what is saved for the backward pass and what is allocated is that device's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from vlmtune import attention
from vlmtune.attention import Kernel, takes_varlen
from vlmtune.planner.ledger import to_meta

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
FROM_VALUES = (torch.tensor, torch.as_tensor)


@dataclass(frozen=True)
class Device:
    """What decides which kernels run."""

    name: str  # "cpu" or "cuda"
    ampere: bool = True  # FlashAttention; older cards have memory-efficient attention only

    @property
    def is_cuda(self) -> bool:
        return self.name == "cuda"


CPU, CUDA, CUDA_BEFORE_AMPERE = Device("cpu", ampere=False), Device("cuda"), Device("cuda", ampere=False)


def _named(*names: str) -> frozenset[Any]:
    """The functions of these names, in torch and of tensors."""
    found = (getattr(where, name, None) for name in names for where in (F, torch, Tensor))
    return frozenset(function for function in found if function is not None)


# What autocast computes in 16 bit and what in 32, of the functions that models are made of:
# https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
# https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/autocast_mode.h
PRODUCTS = _named(
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "addr", "addbmm", "baddbmm", "chain_matmul",
    "einsum", "prelu", "bilinear", "scaled_dot_product_attention",
)  # fmt: skip
PRODUCTS_ON_CPU = _named(
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "scaled_dot_product_attention",
)  # fmt: skip
EXACT = _named(
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh", "tan",
    "pow", "__pow__", "__rpow__", "renorm", "logsumexp", "dist", "cdist", "norm", "layer_norm", "group_norm", "softplus",
    "softmin", "pdist", "nll_loss", "cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
    "binary_cross_entropy_with_logits", "cosine_similarity",
    "softmax", "log_softmax", "cumprod", "cumsum", "sum", "prod",
)  # fmt: skip
EXACT_ON_CPU = _named(
    "mse_loss", "cosine_embedding_loss", "nll_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "cross_entropy", "kl_div",
    "binary_cross_entropy_with_logits", "prod", "cdist", "trace",
)  # fmt: skip
OWN_DTYPE = _named("softmax", "log_softmax", "cumprod", "cumsum", "sum", "prod")  # stay with a `dtype` that is given


class Kernels(TorchFunctionMode):
    """Chooses for tensors on the meta device as the device would. Real tensors are left alone.

    Whether autocast is on is told by the CPU's, which trainer and checkpointing switch there. A backward pass leaves the mode:
    what is computed again in there needs it as checkpointing's `context_fn`.

    Attributes:
        follows_again: called when a layer first runs, makes a context for its second time.

    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.follows_again: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._products = PRODUCTS if device.is_cuda else PRODUCTS_ON_CPU
        self._exact = EXACT if device.is_cuda else EXACT_ON_CPU
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}  # of weights that are trained, as autocast keeps them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FROM_VALUES and str(kwargs.get("device")) == "meta":  # torch would drop the values
            tensor = func(*args, **{**kwargs, "device": "cpu"})
            return to_meta(tensor) if tensor.is_floating_point() else tensor
        if func in self._products or func in self._exact:
            args, kwargs = self._autocast(func, args, kwargs)
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return self._attend(*args, **kwargs)
        if func is F.dropout and self.device.is_cuda:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def again(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Checkpointing's `context_fn`."""
        follows = self.follows_again()

        @contextmanager
        def both() -> Generator[None]:
            with follows, self:
                yield

        return nullcontext(), both()

    def forget_casts(self) -> None:
        """Drops the casts that autocast keeps."""
        self._cast.clear()

    def kernel_for(self, query: Tensor) -> Kernel:
        """As `attention.kernel_for`, on this device."""
        if self.device.is_cuda:
            return "varlen" if self.device.ampere and takes_varlen(query) else "sdpa"
        return "written out" if query.dtype == torch.bfloat16 else "sdpa"

    def _autocast(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not torch.is_autocast_enabled("cpu"):
            return args, kwargs
        if func in self._products:
            half = torch.get_autocast_dtype("cpu")
            return _each(args, partial(self._lower, dtype=half)), _each(kwargs, partial(self._lower, dtype=half))
        if func in OWN_DTYPE:
            given = kwargs.get("dtype") is not None
            lower = bool(args) and isinstance(args[0], Tensor) and args[0].dtype in HALF
            return args, kwargs if given or not lower else {**kwargs, "dtype": torch.float32}
        return _each(args, _raise), _each(kwargs, _raise)

    def _lower(self, tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float32):
            return tensor.to(dtype)
        if id(tensor) not in self._cast:
            self._cast[id(tensor)] = tensor, tensor.to(dtype)
        return self._cast[id(tensor)][1]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not self.device.is_cuda:
            bias = _as_bias(attn_mask, query)
            kernel = aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]
        width, half = query.shape[-1], query.dtype in HALF
        if self.device.ampere and attn_mask is None and half and width <= 256 and key.shape[-1] == value.shape[-1] == width:
            padding = -width % 8
            scale = scale or width**-0.5
            if padding:
                query, key, value = (F.pad(tensor, (0, padding)) for tensor in (query, key, value))
            kernel = aten._scaled_dot_product_flash_attention
            output = kernel(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
            return output[..., :width] if padding else output
        if enable_gqa:  # memory-efficient attention takes as many key heads as query heads
            shared = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
        bias = _as_bias(attn_mask, query)
        if bias is not None:
            if bias.shape[-1] % 16:  # rows of a bias begin at 16 bytes
                missing = -bias.shape[-1] % 16
                bias = F.pad(bias, (0, missing))[..., :-missing]
            bias = bias.expand(*query.shape[:-1], key.shape[-2])
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        kernel = aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, bias, trained, dropout_p, is_causal, scale=scale)[0]


def _each(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, dict):
        return {name: _each(value, function) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_each(value, function) for value in values)
    return function(values) if isinstance(values, Tensor) else values


def _raise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def _as_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask of true and false as the numbers that are added to scores; SDPA makes them before it calls a kernel."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    bias = torch.zeros(mask.shape, dtype=query.dtype, device="meta")
    return bias.masked_fill_(mask.logical_not(), float("-inf"))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's is one kernel that keeps a mask of a byte; on other devices dropout falls apart."""
    if not input.is_meta or not training or not p or inplace:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


# ------------------------------------------------------------------------------------------------------------ scratch


def scratch_on(device: Device) -> Callable[[str, Any], int]:
    """The function that tells how many bytes a kernel takes for itself while it runs, by its operator and arguments."""
    table = ON_CUDA if device.is_cuda else ON_CPU

    def scratch(name: str, args: Any) -> int:
        found = table.get(name)
        return found(args) if found else 0

    return scratch


def _dequantized(args: Any) -> int:
    """Bitsandbytes multiplies more than a few rows by the weight in 16 bit, and unpacks its statistics for that.

    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/backends/default/ops.py
    """
    weights, blocks = math.prod(args[2]), -(-math.prod(args[2]) // args[4])
    nested = len(args) > 7 and args[7] is not None  # `absmax_8bit`; torch hands all arguments on in order
    return weights * args[0].element_size() + (blocks * 4 if nested else 0)


def _flash_backward(args: Any) -> int:
    """Sums in 32 bit, and gradients of each query head's keys where heads share them.

    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp
    """
    _, query, key = args[:3]
    rows, heads, length, width = query.shape
    key_heads, key_length = key.shape[1:3]
    length, wide = -(-length // 128) * 128, -(-width // 32) * 32
    sums = rows * heads * length * (wide + 1) * 4
    return sums + (2 * rows * heads * key_length * width * query.element_size() if key_heads != heads else 0)


def _efficient_backward(args: Any) -> int:
    """Sums in 32 bit.

    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/attention_backward.cu
    """
    query = args[1]
    *batch, length, width = query.shape
    rows = math.prod(batch)
    sums = -(-length // 64) * 64 * -(-width // 32) * 32 * 4 if length > 64 else 0
    return rows * (-(-length // 32) * 32 * 4 + sums)


def _varlen_backward(args: Any) -> int:
    """The same, for rows that lie one after the other, `[seq, heads, head_dim]`."""
    query, key = args[1], args[2]
    return _flash_backward((None, query[None].transpose(1, 2), key[None].transpose(1, 2)))


def _asked(function: Callable[..., Any]) -> Callable[[Any], int]:
    """Has this processor's kernel say it: oneDNN's scratchpads depend on shapes, cache and instruction set.

    Products of 32-bit matrices are MKL's, whose memory is not torch's.
    """

    def scratch(args: Any) -> int:
        exact = args[0].dtype == torch.float32 and function is not aten.convolution.default
        return 0 if exact else _beside_result(function, _described(args))

    return scratch


@cache
def _beside_result(function: Callable[..., Any], described: Any) -> int:
    """Bytes that a function allocates beside its result, for arguments like these."""
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        arguments = _undescribed(described)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
            result = function(*arguments)
    results: Any = recorder.profiler.kineto_results if recorder.profiler else None
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    del result
    return max(live, default=0) - (live[-1] if live else 0)


@dataclass(frozen=True)
class _Layout:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _described(value: Any) -> Any:
    """Arguments, tensors as their layouts, lists as tuples: something to look up by."""
    if isinstance(value, Tensor):
        return _Layout(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(_described, value)) if isinstance(value, list | tuple) else value


def _undescribed(value: Any) -> Any:
    if isinstance(value, _Layout):
        return torch.empty_strided(value.shape, value.strides, dtype=value.dtype).zero_()
    return [_undescribed(each) for each in value] if isinstance(value, tuple) else value


def _dequantized_on_cpu(args: Any) -> int:
    rows = args[0].new_empty(args[0].shape)
    return _dequantized(args) + _asked(aten.linear.default)((rows, rows.new_empty(tuple(args[2]))))


ON_CPU: dict[str, Callable[[Any], int]] = {
    "bitsandbytes::gemm_4bit": _dequantized_on_cpu,
    "aten::mm": _asked(aten.mm.default),
    "aten::addmm": _asked(aten.addmm.default),
    "aten::bmm": _asked(aten.bmm.default),
    "aten::baddbmm": _asked(aten.baddbmm.default),
    "aten::convolution": _asked(aten.convolution.default),
}
ON_CUDA: dict[str, Callable[[Any], int]] = {
    "bitsandbytes::gemm_4bit": _dequantized,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}
CUBLAS = 8_519_680  # bytes of a workspace; two handles have one each, https://docs.nvidia.com/cuda/cublas/#cublassetworkspace


# ------------------------------------------------------------------------------------------------------- whole stand-ins


@contextmanager
def stand_ins(kernels: Kernels) -> Generator[None]:
    """What would ask for the real device, answered for the one that is played. For a process that does nothing else.

    * packed rows are attended to by the kernel of that device;
    * autocast keeps the casts of weights until the outermost ends;
    * TRL's Triton kernels write into memory that is there already: they do nothing here;
    * torch's fused optimisers, which work in place, refuse tensors of a device that they do not know.
    """
    import trl.kernels.chunked_logprob as head
    import trl.trainer.utils as trl_utils

    from vlmtune import trainer

    attention.register(kernels.kernel_for)
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    clear, state = torch.clear_autocast_cache, torch.get_rng_state

    def clear_casts() -> None:
        kernels.forget_casts()
        clear()

    replaced: list[Any] = [
        patch.object(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None),
        patch.object(torch, "is_autocast_enabled", lambda device="cuda": enabled(_played(device))),
        patch.object(torch, "get_autocast_dtype", lambda device: dtype(_played(device))),
        patch.object(torch, "clear_autocast_cache", clear_casts),
    ]
    if kernels.device.is_cuda:
        replaced += [
            patch.object(head, "_use_triton", lambda _: True),
            patch.object(trl_utils, "_use_triton", lambda _: True),
            patch.object(trainer, "has_kernels", lambda _: True),
            patch.object(head, "_forward_kernel", _NoKernel()),
            patch.object(head, "_backward_kernel", _NoKernel()),
            patch.object(head, "_addmm_fp32", _add_product),
        ]
    else:  # checkpointing keeps the state of the random numbers, which no operator makes
        replaced.append(patch.object(torch, "get_rng_state", lambda: state().clone()))
    for each in replaced:
        each.start()
    try:
        yield
    finally:
        for each in replaced:
            each.stop()
        attention.register()


def _played(device: str) -> str:
    """Autocast is asked about the meta device, and switched on the CPU."""
    return "cpu" if device == "meta" else device


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """CuBLAS adds the product of 16-bit matrices up in 32 bit, in place; no matrix is cast."""
    with _disable_current_modes():
        left, right = (torch.empty(tensor.shape, device="meta") for tensor in (left, right))
    total.addmm_(left, right)


class _NoKernel:
    """A Triton kernel that is started and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None
