"""A copy in 4 or 8 bit, quantised as in training, and what that does to its loss."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtune.collator import MultimodalCollator
from vlmtune.console import progress
from vlmtune.data import load_data, spread
from vlmtune.errors import ModelError
from vlmtune.evaluation import probe
from vlmtune.export.merged import Merged
from vlmtune.model import (
    device,
    evaluating,
    keep_training_layout,
    on_device,
    quantization_config,
    read_model,
    read_processor,
)

Sample = dict[str, Any]


@dataclass(frozen=True)
class Losses:
    """What quantising did to the answers' loss, a token's on average."""

    rows: str  # on which it was measured
    before: float
    after: float
    logits: float | None  # largest difference, on the probe that stands in where no recipe names rows


def write_quantised(merged: Merged, out: Path, kind: str, rows: int) -> Losses:
    """Writes a copy that plain `from_pretrained` loads, and measures it as it is read back.

    Args:
        merged: the model.
        out: an empty directory.
        kind: nf4 or int8.
        rows: of the recipe's data, on which the loss is measured; 0 or no recipe: a probe.

    Raises:
        ModelError: it cannot be quantised here, or answers no numbers.
        DatasetError: the recipe's data cannot be read.

    """
    samples, named = _samples(merged, rows)
    processor = read_processor(merged.section, merged.family, merged.directory)
    on_all = not merged.recipe or merged.recipe.train_on_inputs or named is None
    batches = [MultimodalCollator(processor, merged.family, on_all)([sample]) for sample in samples]
    with progress() as shown:
        task = shown.add_task("Quantising", total=2 * len(batches) + 1, text="loss before")
        before = _Measured.of(merged, merged.directory, batches, lambda: shown.advance(task))
        shown.update(task, text=f"to {kind}")
        _quantise(merged, out, kind)
        shown.update(task, advance=1, text="loss after")
        after = _Measured.of(merged, out, batches, lambda: shown.advance(task))
    if not math.isfinite(after.loss):
        raise ModelError(f"the {kind} copy's loss is {after.loss} on {named or 'a probe'}: nothing was written")
    logits = None if named else (after.logits - before.logits).abs().max().item()
    probed = "a probe" if merged.recipe else "a probe, as there is no recipe"
    return Losses(named or probed, before.loss, after.loss, logits)


def _quantise(merged: Merged, out: Path, kind: str) -> None:
    section = merged.section.model_copy(update={"quantization": kind})
    config = quantization_config(section, merged.family, merged.dtype)
    model = read_model(section, merged.family, dtype=merged.dtype, device_map={"": device()}, quantization_config=config)
    if not any(hasattr(parameter, "quant_state") or hasattr(parameter, "SCB") for parameter in model.parameters()):
        raise ModelError(f"{merged.directory} has no layer that can be quantised")
    model.save_pretrained(str(out))
    merged.copy_rest(out, but=[path.name for path in out.iterdir()])
    del model
    gc.collect()


@dataclass(frozen=True)
class _Measured:
    loss: float
    logits: Tensor  # of the last batch

    @classmethod
    def of(cls, merged: Merged, directory: Path, batches: Sequence[dict[str, Tensor]], tell: Any) -> _Measured:
        """Loads a model plainly and measures its loss on each row by itself."""
        model: Any = read_model(merged.section, merged.family, directory, dtype="auto", device_map="auto")
        keep_training_layout(model)
        total, count, logits = 0.0, 0, torch.empty(0)
        with evaluating(model):
            for batch in batches:
                tokens = int((batch["labels"][:, 1:] >= 0).sum())
                output = model(**merged.family.model_inputs(on_device(batch, model)))
                total, count = total + output.loss.item() * tokens, count + tokens
                logits = output.logits.float().cpu()
                del output
                tell()
        del model
        gc.collect()
        return cls(total / count, logits)


def _samples(merged: Merged, count: int) -> tuple[list[Sample], str | None]:
    """Rows of the recipe's data, held-out ones if any, and what they are called; else a probe."""
    if merged.recipe is None or count == 0:
        return [probe(pictures=merged.family.takes_images)], None
    split = load_data(merged.recipe.data, seed=int(merged.recipe.train.get("seed", 42)))
    rows = split.held_out or split.train
    found = spread(rows, count)
    return found, f"{len(found)} {'held-out' if split.held_out else 'training'} rows of {rows.source}"
