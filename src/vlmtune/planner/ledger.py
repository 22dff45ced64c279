"""Running a model without weights or a device, and what that would have allocated and computed.

Weights and activations lie on the meta device: they have a shape, a dtype and a storage, and no memory. What decides shapes
by its values, token ids, grids, masks, stays on the CPU, where it has some. `Outline` lets the two meet; `Ledger` follows
besides every storage from its first tensor to its last.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config as symbolic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from vlmtune.errors import ModelError

aten = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}  # by masks, perhaps
ATTENTION = ("attention", "attn")  # in the names of operators that are
FOUR_BIT = ("bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit")
BYTES_PER_DEQUANTIZED = 2.5  # half a byte read, two written

FORMULAS = {  # which torch lacks
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
}


class Outline(TorchDispatchMode):
    """Lets tensors on the meta device meet real ones, and makes integers for real, so that they have values.

    What is chosen by the values of an activation is taken as all of it; `assumed` names such operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.assumed: set[str] = set()

    def __enter__(self) -> Any:
        # https://github.com/pytorch/pytorch/blob/main/torch/fx/experimental/_config.py
        self._switch = symbolic.meta_nonzero_assume_all_nonzero
        symbolic.meta_nonzero_assume_all_nonzero = True
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        symbolic.meta_nonzero_assume_all_nonzero = self._switch
        super().__exit__(*details)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})[0]

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """The result, and the arguments as they were given to the operator."""
        packet = func._overloadpacket
        if packet in INDEXED:
            if any(isinstance(index, Tensor) and index.is_meta and index.dtype == torch.bool for index in args[1]):
                self.assumed.add(func._schema.name)
            args = (args[0], _places(args[1], args[0]), *args[2:])
        kinds = _kinds(args) | _kinds(kwargs.values())
        wanted = kwargs.get("device")
        if True in kinds:  # a tensor on the meta device
            if False in kinds:
                args, kwargs = tree_map_only(Tensor, to_meta, (args, kwargs))
            if wanted is not None:
                kwargs = {**kwargs, "device": META}
            if packet is aten._local_scalar_dense or packet is aten.equal:
                self.assumed.add(func._schema.name)
                return (0.0 if args[0].is_floating_point() else 0), args, kwargs
            if packet is aten.nonzero or packet is aten.masked_select:
                self.assumed.add(func._schema.name)
            if packet is aten.masked_scatter_backward:  # how many are selected is known by the sizes
                return args[0].new_empty(args[2]), args, kwargs
        elif wanted is not None and torch.device(wanted).type == "meta":
            dtype = kwargs.get("dtype") or next((x.dtype for x in args if isinstance(x, Tensor)), None)
            if dtype is None and packet is aten.arange and not any(isinstance(x, float) for x in args):
                dtype = torch.int64
            if dtype is not None and not dtype.is_floating_point:
                kwargs = {**kwargs, "device": CPU}
            else:
                args, kwargs = tree_map_only(Tensor, to_meta, (args, kwargs))
        try:
            return func(*args, **kwargs), args, kwargs
        except NotImplementedError as error:
            raise ModelError(f"{func._schema.name} cannot be run without values, so this model's memory is unknown") from error


def to_meta(tensor: Tensor) -> Tensor:
    """The tensor without its memory."""
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _kinds(values: Iterable[Any]) -> set[bool]:
    """Whether there are tensors on the meta device, and whether elsewhere."""
    kinds: set[bool] = set()
    for value in values:
        if isinstance(value, Tensor):
            kinds.add(value.is_meta)
        elif isinstance(value, list | tuple):
            kinds |= _kinds(value)
    return kinds


def _places(indices: Sequence[Any], indexed: Tensor) -> list[Any]:
    """Masks as the places where they are true, which is what torch makes of them."""
    if not indexed.is_meta:
        return list(indices)
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            found.extend(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


class Where(NamedTuple):
    """What memory was asked for."""

    what: str  # "forward", "loss", "again", "backward", "optimiser", "scratch"; or what a tensor is: "adapters", "inputs"
    module: str  # innermost of those that are watched, or in the backward pass the node of the graph
    operator: str


class Event(NamedTuple):
    """An allocation, or with a negative size the end of it."""

    number: int
    size: int  # bytes
    where: Where | None


class Ledger(Outline):
    """Follows every allocation, and counts what is computed.

    Args:
        scratch: bytes that an operator's kernel takes for itself while it runs, by its name and arguments.

    Attributes:
        optimises: whether what comes now is the optimiser's.
        flops, bytes: by kind: "matmul", "attention"; "elementwise", "dequantized".
        kernels: how many were started.
        operators: the names of those that allocated anything.

    """

    def __init__(self, scratch: Callable[[str, Any], int]) -> None:
        super().__init__()
        self.optimises = False
        self.flops: Counter[str] = Counter()
        self.bytes: defaultdict[str, float] = defaultdict(float)
        self.kernels = 0
        self.operators: set[str] = set()
        self._scratch = scratch
        self._before: list[Event] = []
        self._events: list[Event] = []
        self._modules: list[str] = []
        self._open: dict[int, tuple[int, int, Any]] = {}  # storage → number, bytes, weak reference
        self._names: dict[int, Where] = {}  # of allocations that turned out to be something
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args
        out, args, kwargs = self.run(func, args, kwargs or {})
        name = func._schema.name
        if func._overloadpacket is aten._to_copy and _stays(given[0], out):
            self._know(out)
            return out
        outputs = [out] if isinstance(out, Tensor) else [x for x in out if isinstance(x, Tensor)] if _many(out) else []
        extra = self._scratch(name, args)
        number = self.allocate(extra, self._where(name)._replace(what="scratch")) if extra else 0
        for tensor in outputs:
            self.follow(tensor, None, name)
        if extra:  # given back once the result is there
            self._free(number, extra)
        self._work(func, name, args, kwargs, out, outputs)
        return out

    def watch(self, module: torch.nn.Module, name: str) -> None:
        """Enters the name with what is allocated while this module runs forward, or runs again in the backward pass."""

        def enter(*_: Any) -> None:
            self._modules.append(name)

        def leave(*_: Any) -> None:
            self._modules.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)  # checkpointing stops in the middle of a second forward

    def again(self) -> AbstractContextManager[None]:
        """A context in which the module that runs now runs again: transformers checkpoints layers inside of their hooks."""
        name = self._modules[-1] if self._modules else ""

        @contextmanager
        def named() -> Generator[None]:
            self._modules.append(name)
            try:
                yield
            finally:
                self._modules.pop()

        return named()

    def begin(self) -> list[Event]:
        """Starts afresh with what is allocated now, which is returned."""
        self._before = alive([*self._before, *self.events])
        self._events = []
        self._names.clear()
        self.flops.clear()
        self.bytes.clear()
        self.kernels, self.optimises = 0, False
        self.operators.clear()
        return self._before

    @property
    def events(self) -> list[Event]:
        """Allocations and their ends, in order."""
        return [event._replace(where=self._names.get(event.number, event.where)) for event in self._events]

    def rename(self, tensor: Tensor, what: str) -> None:
        """Counts what was allocated for a tensor as something else."""
        entry = self._open.get(_address(tensor.untyped_storage()))
        if entry is not None:
            self._names[entry[0]] = Where(what, "", "")

    def follow(self, tensor: Tensor, where: Where | None, operator: str = "") -> None:
        """Enters a tensor's storage, if it is new, until it is gone."""
        storage = tensor.untyped_storage()
        key, size = _address(storage), storage.nbytes()
        if key in self._open or not size:
            return
        number = self.allocate(size, where or self._where(operator))
        self._open[key] = number, size, weakref.ref(storage, lambda _, key=key: self._close(key))

    def _know(self, tensor: Tensor) -> None:
        """Takes a storage as known that is none on the device."""
        storage = tensor.untyped_storage()
        key = _address(storage)
        self._open[key] = 0, 0, weakref.ref(storage, lambda _: self._open.pop(key))

    def allocate(self, size: int, where: Where) -> int:
        """Enters memory that is no tensor's, and returns its number."""
        self._count += 1
        self._events.append(Event(self._count, size, where))
        return self._count

    def _free(self, number: int, size: int) -> None:
        self._events.append(Event(number, -size, None))

    def _close(self, key: int) -> None:
        number, size, _ = self._open.pop(key)
        self._free(number, size)

    def _where(self, operator: str) -> Where:
        # what torch's own anomaly mode asks; None outside of a backward pass
        node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage]
        if node is None:
            if self._modules:
                return Where("forward", self._modules[-1], operator)
            return Where("optimiser" if self.optimises else "loss", "", operator)
        if self._modules:
            return Where("again", self._modules[-1], operator)
        return Where("backward", node.name(), operator)

    def _work(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any, outputs: Sequence[Tensor]) -> None:
        if func.is_view or not any(tensor.is_meta for tensor in outputs):
            return
        self.kernels += 1
        self.operators.add(name)
        if name in FOUR_BIT:
            weights = math.prod(args[2] if name == FOUR_BIT[0] else args[4])
            self.bytes["dequantized"] += weights * BYTES_PER_DEQUANTIZED
            if name == FOUR_BIT[0]:
                self.flops["matmul"] += 2 * args[0].numel() * args[2][0]
            return
        if formula := FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket):
            kind = "attention" if any(part in name for part in ATTENTION) else "matmul"
            self.flops[kind] += formula(*args, **kwargs, out_val=out)
            return
        read = sum(tensor.nbytes for tensor in args if isinstance(tensor, Tensor))
        self.bytes["elementwise"] += read + sum(tensor.nbytes for tensor in outputs)


def _address(storage: torch.UntypedStorage) -> int:
    """By which a storage is known while it lives, whether it has memory or not."""
    return storage._cdata  # pyright: ignore[reportPrivateUsage]


def _stays(tensor: Tensor, copy: Tensor) -> bool:
    """Whether a real tensor is only brought to the meta device, where in truth it is on the device already."""
    return copy.is_meta and not tensor.is_meta and copy.dtype == tensor.dtype


def _many(out: Any) -> bool:
    return isinstance(out, list | tuple)


def peak(events: Sequence[Event], rounded: Callable[[int], int]) -> tuple[int, int]:
    """Most bytes that were allocated at once, sizes rounded as the allocator does, and the event with which that was so."""
    live = most = at = 0
    for index, event in enumerate(events):
        live += rounded(event.size) if event.size > 0 else -rounded(-event.size)
        if live > most:
            most, at = live, index
    return most, at


def alive(events: Sequence[Event]) -> list[Event]:
    """The allocations that have not ended with the last of these events."""
    live: dict[int, Event] = {}
    for event in events:
        if event.size > 0:
            live[event.number] = event
        else:
            live.pop(event.number, None)
    return list(live.values())
