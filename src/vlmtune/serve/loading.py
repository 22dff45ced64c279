"""From a directory to what is served: model, processor and contract, all three of one mind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlmtune.collator import MultimodalCollator
from vlmtune.errors import ModelError, one_line
from vlmtune.families import Family, find_family
from vlmtune.model import compute_dtype, keep_training_layout, load_base, old_names_allowed, read_model, read_processor
from vlmtune.serving import Serving, faults, read_serving


@dataclass(frozen=True)
class Served:
    """A tuned model that is ready to answer, and how it is to be asked."""

    directory: Path
    contract: Serving
    model: Any
    collator: MultimodalCollator


def load_served(directory: Path, *, base: str | None = None, use_cpu: bool = False) -> Served:
    """The model of a run's directory or of a merged one, in the dtype and quantisation that it was trained in.

    Args:
        directory: with a contract.
        base: hub id or directory of an adapter's base, if it is no longer where it was trained.
        use_cpu: leave a GPU alone.

    Raises:
        ModelError: no contract, files that do not keep it, or a model that cannot be loaded.

    """
    found = read_serving(directory, base=base)
    family = find_family(found.model.family)
    processor = read_processor(found.model, family, directory)
    if wrong := faults(found, directory, processor):
        raise ModelError(f"{directory} is not as it was trained: {'; '.join(wrong)}")
    collator = MultimodalCollator(processor, family, train_on_inputs=True, chat_template=processor.chat_template)
    read = _with_adapter if found.kind == "adapter" else _merged
    return Served(directory, found, read(found, directory, family, use_cpu=use_cpu), collator)


def _with_adapter(found: Serving, directory: Path, family: Family, *, use_cpu: bool) -> Any:
    base = load_base(found.model, family, use_cpu=use_cpu)
    try:
        with old_names_allowed():
            model = PeftModel.from_pretrained(base, str(directory))
        saved = load_file(directory / "adapter_model.safetensors")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the adapter in {directory} cannot be loaded: {one_line(error)}") from error
    there = get_peft_model_state_dict(model)
    if astray := [name for name in saved if name not in there]:  # peft only warns
        raise ModelError(
            f"{len(astray)} of {len(saved)} tensors of the adapter in {directory} match no module of {found.model.name}, the "
            f"first is {astray[0]}: it was trained on another model or with another version of transformers"
        )
    keep_training_layout(model)
    return model.eval()


def _merged(found: Serving, directory: Path, family: Family, *, use_cpu: bool) -> Any:
    where = "cpu" if use_cpu else "auto"
    return read_model(found.model, family, directory, dtype=compute_dtype(found.model), device_map=where).eval()
