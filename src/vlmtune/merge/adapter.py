"""A LoRA adapter as it lies on the disk, and what it does to each weight of its base."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmtune.errors import ModelError, one_line

# what a tensor of an adapter is called: https://huggingface.co/docs/peft/developer_guides/checkpoint
LORA = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)
TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
BASE = re.compile(r"(?P<module>.+)\.base_layer(?P<leaf>\.weight|\.bias)")
# these change what an adapter computes, in ways that are not a sum of weights or that nobody has tried here
NOT_MERGED = (
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "use_qalora",
    "layer_replication",
    "kasa_config",
    "monteclora_config",
    "target_parameters",
    "lora_bias",
    "fan_in_fan_out",
    "megatron_config",
)
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # others take something out of the base


class Change(Protocol):
    """What an adapter does to some rows of a weight: float32 `[rows, columns]` in, the same out."""

    def __call__(self, rows: Tensor, first: int) -> Tensor: ...


@dataclass(frozen=True)
class LowRank:
    """W + scale · B A, and with DoRA each row of that at its own length."""

    left: Tensor  # [rows of the weight, r]
    right: Tensor  # [r, columns]
    scale: float
    magnitude: Tensor | None = None  # [rows of the weight]

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        here = slice(first, first + len(rows))
        changed = (self.left[here] @ self.right).mul_(self.scale).add_(rows)
        if self.magnitude is not None:
            changed *= (self.magnitude[here] / torch.linalg.norm(changed, dim=1))[:, None]
        return changed


@dataclass(frozen=True)
class Replaced:
    """A weight that was trained whole: of `modules_to_save`, or a bias."""

    values: Tensor  # [rows, columns]

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        return self.values[first : first + len(rows)].float()


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding that were trained by themselves."""

    at: Tensor  # [tokens]
    values: Tensor  # [tokens, columns]

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        here = (self.at >= first) & (self.at < first + len(rows))
        return rows.index_copy(0, self.at[here] - first, self.values[here].float())


@dataclass(frozen=True)
class Adapter:
    """An adapter's config and its tensors, which are read when they are asked for."""

    path: Path  # of the file
    config: LoraConfig
    names: tuple[str, ...]
    tensor: Callable[[str], Tensor] = field(repr=False)

    @property
    def directory(self) -> Path:
        return self.path.parent

    def tokens(self, part: Part) -> list[int]:
        """The rows of an embedding that were trained by themselves."""
        wanted = self.config.trainable_token_indices
        if not isinstance(wanted, Mapping):
            return list(wanted or [])
        module = part.parameter.removesuffix(".weight")
        return next((list(indices) for name, indices in wanted.items() if module.endswith(name)), [])


def read_adapter(directory: Path) -> Adapter:
    """An adapter that PEFT saved.

    Raises:
        ModelError: there is none, it is damaged or empty, or it is not one that can be added to its base's weights.

    """
    config = _config(directory)
    refused = [name for name in NOT_MERGED if getattr(config, name, None)]
    if not refused and config.init_lora_weights not in INITIALISATIONS:
        refused = [f"init_lora_weights: {config.init_lora_weights}"]
    if refused:
        raise ModelError(f"the adapter in {directory} uses PEFT's `{refused[0]}`, which is not merged here")
    path, tensor, names = _tensors(directory)
    if not names:
        raise ModelError(f"the adapter in {directory} holds no tensors: it was not saved as it should be")
    return Adapter(path, config, tuple(sorted(names)), tensor)


def _config(directory: Path) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{directory} holds no adapter: adapter_config.json cannot be read ({one_line(error)})") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{directory} holds an adapter of the kind {config.peft_type}: only LoRA is merged")
    return config


def _tensors(directory: Path) -> tuple[Path, Callable[[str], Tensor], list[str]]:
    path, pickled = directory / "adapter_model.safetensors", directory / "adapter_model.bin"
    try:
        if path.exists():
            file: Any = safe_open(path, framework="pt")  # pyright: ignore[reportUnknownVariableType]
            return path, file.get_tensor, list(file.keys())
        if pickled.exists():
            state: dict[str, Tensor] = torch.load(pickled, weights_only=True, mmap=True)
            return pickled, state.__getitem__, list(state)
    except (SafetensorError, RuntimeError, ValueError, OSError, EOFError) as error:
        raise ModelError(f"the weights of the adapter in {directory} cannot be read: {one_line(error)}") from error
    raise ModelError(f"{directory} holds no adapter weights: adapter_model.safetensors is missing")


@dataclass(frozen=True)
class Part:
    """The tensors of an adapter that bear on one parameter of the base."""

    parameter: str  # as the base's file may call it: `model.layers.0.self_attn.q_proj.weight`
    names: Mapping[str, str]  # kind → tensor of the adapter


def parts(adapter: Adapter) -> list[Part]:
    """The adapter's tensors by the parameter that they change, under the name at which they were trained.

    Raises:
        ModelError: two for the same.

    """
    found: dict[str, dict[str, str]] = {}
    for name in adapter.names:
        plain = name.removeprefix("base_model.model.")
        if lora := LORA.fullmatch(plain):
            parameter, kind = lora["module"] + ".weight", lora["kind"].removeprefix("lora_")
        elif tokens := TOKENS.fullmatch(plain):
            parameter, kind = tokens["module"] + ".weight", "tokens"
        elif base := BASE.fullmatch(plain):
            parameter, kind = base["module"] + base["leaf"], "whole"
        else:
            parameter, kind = plain, "whole"
        if earlier := found.setdefault(parameter, {}).get(kind):
            raise ModelError(f"the adapter in {adapter.directory} has two tensors for the same: {earlier} and {name}")
        found[parameter][kind] = name
    return [Part(parameter, names) for parameter, names in found.items()]


def changes(adapter: Adapter, part: Part, shape: tuple[int, ...]) -> list[Change]:
    """What the adapter does to a weight of this shape, in PEFT's order.

    Raises:
        ModelError: tensors are missing, or of another shape than the weight wants.

    """
    made: list[Change] = []
    tensors = {kind: adapter.tensor(name) for kind, name in part.names.items()}
    whole, tokens = tensors.pop("whole", None), tensors.pop("tokens", None)
    if whole is not None:
        _fits(adapter, part, tuple(whole.shape), shape)
        made.append(Replaced(whole.reshape(shape[0], -1)))
    if tensors:
        made.append(_low_rank(adapter, part, tensors, shape))
    if tokens is not None:
        at = adapter.tokens(part)
        _fits(adapter, part, tuple(tokens.shape), (len(at), *shape[1:]))
        made.append(Tokens(torch.tensor(at), tokens))
    return made


def _low_rank(adapter: Adapter, part: Part, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> LowRank:
    embedding = "embedding_A" in tensors or "embedding_B" in tensors
    a, b = (tensors.get(f"embedding_{side}" if embedding else side) for side in "AB")
    if a is None or b is None:
        found = ", ".join(part.names.values())
        raise ModelError(f"the adapter in {adapter.directory} has half of what {part.parameter} needs: {found}")
    left, right = (a.float().T, b.float().T) if embedding else (b.float().flatten(1), a.float().flatten(1))
    _fits(adapter, part, (len(left), right.shape[1]), (shape[0], math.prod(shape[1:])))
    magnitude = tensors.get("magnitude_vector")
    if magnitude is not None and embedding:
        raise ModelError(f"{part.parameter} was trained with DoRA on an embedding: merge it with PEFT's merge_and_unload")
    lengths = None if magnitude is None else magnitude.float().view(-1)
    return LowRank(left.contiguous(), right.contiguous(), scaling(adapter, part, len(right)), lengths)


def scaling(adapter: Adapter, part: Part, rank: int) -> float:
    """Alpha over the rank, or over its root; `alpha_pattern` has the last word."""
    config, module = adapter.config, part.parameter.rpartition(".")[0]
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _fits(adapter: Adapter, part: Part, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ModelError(
            f"the adapter in {adapter.directory} does not fit its base: what it has for {part.parameter} is {list(found)} "
            f"where the base has {list(wanted)}"
        )
