"""A merged model held against base and adapter, before it appears."""

from __future__ import annotations

import copy
import gc
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from vlmtune.console import bar
from vlmtune.errors import ModelError, one_line
from vlmtune.evaluation import probe
from vlmtune.merge.adapter import Adapter, Part
from vlmtune.merge.base import Base
from vlmtune.merge.stream import Layout, Target
from vlmtune.merge.weights import CODES, stored
from vlmtune.model import old_names_allowed, read_model

ROWS, COLUMNS = 32, 64  # of each weight that is looked at


def check_files(layout: Layout, directory: Path) -> None:
    """Each file holds what was laid out and nothing else; read by safetensors' own library.

    Raises:
        ModelError: one does not.

    """
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if len(layout.files) > 1:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if listed != {target.entry.name: name for name, targets in layout.files.items() for target in targets}:
            raise ModelError(f"{index.name} does not list what was laid out; nothing was written")
    for name, targets in layout.files.items():
        wanted = {target.entry.name: (target.entry.shape, CODES[target.entry.dtype]) for target in targets}
        try:
            with safe_open(directory / name, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
                found = {key: _shape_and_dtype(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118, it is no dict
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{name} cannot be read back: {one_line(error)}; nothing was written") from error
        if found != wanted:
            astray = min(set(found.items()) ^ set(wanted.items()))[0]
            raise ModelError(f"{name} does not hold {astray} as it was laid out; nothing was written")


def _shape_and_dtype(tensor: Any) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.get_shape()), tensor.get_dtype()


def check_weights(layout: Layout, adapter: Adapter, model: nn.Module, directory: Path) -> float:
    """A piece of every changed weight, read back and compared with base + adapter.

    What base + adapter is there, PEFT says: its own layer, made by the adapter's config around this piece of the base, is
    asked for what it does to single inputs.

    Args:
        model: the base without weights.

    Returns:
        The largest difference of a weight.

    Raises:
        ModelError: a weight differs by more than rounding it once explains, or is no number.

    """
    written = {tensor.name: tensor for name in layout.files for tensor in stored(directory / name)}
    largest = 0.0
    for place, target in enumerate(bar(layout.changed, "Comparing")):
        first = _first_row(adapter, target, place)
        base = target.source.some(first, ROWS).float()
        expected = base
        for part in target.parts:
            expected = _with_adapter(adapter, part, _module_of(model, target), expected, first)
        columns = _columns(base)
        found = written[target.entry.name].some(first, ROWS).float()[:, columns]
        difference = (found - expected[:, columns]).abs()
        unit = torch.finfo(target.entry.dtype).eps / 2  # relative error of a number that is rounded once
        allowed = unit * expected[:, columns].abs() + 1e-5 * expected.abs().max()
        if not bool((difference <= allowed).all()):
            raise ModelError(
                f"the merged {target.entry.name} is not base + adapter, from which it differs by up to "
                f"{difference.max().item():.3g}; nothing was written"
            )
        largest = max(largest, difference.max().item())
    return largest


def _first_row(adapter: Adapter, target: Target, place: int) -> int:
    """Where to look: from another row in every weight on, and where single rows were trained at the first of them."""
    trained = [adapter.tokens(part)[0] for part in target.parts if "tokens" in part.names]
    return trained[0] if trained else (place * 7919) % max(1, target.source.rows - ROWS)


def _columns(rows: Tensor) -> Tensor:
    return torch.linspace(0, rows.shape[1] - 1, min(COLUMNS, rows.shape[1])).long()


def _module_of(model: nn.Module, target: Target) -> nn.Module:
    return model.get_submodule((target.parameter or "").rpartition(".")[0])


def _with_adapter(adapter: Adapter, part: Part, module: nn.Module, base: Tensor, first: int) -> Tensor:
    """These rows of base + adapter, right in those columns that are looked at."""
    rows = slice(first, first + len(base))
    if "whole" in part.names:
        base = adapter.tensor(part.names["whole"])[rows].float().reshape(base.shape)
    if "tokens" in part.names:
        base = base.clone()
        for token, values in zip(adapter.tokens(part), adapter.tensor(part.names["tokens"]), strict=True):
            if first <= token < first + len(base):
                base[token - first] = values.float()
    kinds = {kind: name for kind, name in part.names.items() if kind not in ("whole", "tokens")}
    lora = {name: _piece(kind, adapter.tensor(name).float(), rows) for kind, name in kinds.items()}
    return _by_peft(adapter.config, part, module, base, lora) if lora else base


def _piece(kind: str, tensor: Tensor, rows: slice) -> Tensor:
    """What of an adapter's tensor bears on these rows."""
    if kind == "embedding_A":  # [r, rows]
        return tensor[:, rows]
    if kind == "magnitude_vector":  # [rows]
        return tensor.flatten()[rows]
    if kind == "B":  # [rows, r], of a convolution [rows, r, 1, 1]
        return tensor[rows].flatten(1)
    return tensor.flatten(1)


def _by_peft(config: LoraConfig, part: Part, module: nn.Module, base: Tensor, lora: dict[str, Tensor]) -> Tensor:
    """The weight by which PEFT's layer multiplies: an embedding is asked for its rows, a linear layer for its columns."""
    embedding = isinstance(module, nn.Embedding)
    piece = nn.Embedding(len(base), base.shape[1]) if embedding else nn.Linear(base.shape[1], len(base), bias=False)
    piece.weight.data = base
    holder = _at(part.parameter.rpartition(".")[0], piece)
    alone = copy.copy(config)
    alone.modules_to_save = alone.trainable_token_indices = None
    alone.lora_dropout, alone.init_lora_weights, alone.ensure_weight_tying = 0.0, False, False
    tensors = {name.removeprefix("base_model.model.").replace(".default", ""): values for name, values in lora.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # an adapter's names may be older than the patterns of its config
        inject_adapter_in_model(alone, holder, state_dict=tensors)
        set_peft_model_state_dict(holder, tensors)
        layer: Any = holder.get_submodule(part.parameter.rpartition(".")[0]).eval()
        if embedding:
            return layer(torch.arange(len(base)))
        columns = _columns(base)
        asked = torch.zeros(len(columns), base.shape[1])
        asked[torch.arange(len(columns)), columns] = 1
        made = base.clone()
        made[:, columns] = layer(asked).T
        return made


def _at(name: str, module: nn.Module) -> nn.Module:
    """A model that has this module at this name and nothing else; a config's patterns are for names."""
    *above, leaf = name.split(".")
    holder = inner = nn.Module()
    for part in above:
        inner.add_module(part, nn.Module())
        inner = inner.get_submodule(part)
    inner.add_module(leaf, module)
    return holder


def check_answers(directory: Path, base: Base, adapter: Adapter, dtype: torch.dtype | None) -> float:
    """The whole of base + adapter and the whole merged model, one after the other in memory, asked the same.

    Returns:
        The largest difference of a logit.

    Raises:
        ModelError: they differ by more than rounding explains.

    """
    batch = base.collator([probe(pictures=base.family.takes_images)])
    del batch["labels"]
    model = read_model(base.section, base.family, dtype=dtype or "auto", device_map="cpu").eval()
    kept = model.dtype
    with old_names_allowed():
        before = _logits(PeftModel.from_pretrained(model, str(adapter.directory)), batch)
    del model
    gc.collect()
    after = _logits(read_model(base.section, base.family, directory, dtype=kept, device_map="cpu").eval(), batch)
    difference = (after - before).abs().max().item()
    allowed = max(1e-4, before.abs().max().item() * (1e-4 if kept == torch.float32 else 0.1))
    if difference > allowed or difference != difference:
        raise ModelError(
            f"the merged model answers otherwise: its logits differ from base + adapter by up to {difference:.3g}, and "
            f"{allowed:.3g} is what rounding to {kept} explains; nothing was written"
        )
    return difference


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        typed = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in batch.items()}
        return model(**typed).logits.float()
