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
from vlmtune.model import (
    Processor,
    check_trust,
    compute_dtype,
    keep_training_layout,
    load_base,
    old_names_allowed,
    read_model,
    read_processor,
)
from vlmtune.serving import Serving, faults, read_serving


@dataclass(frozen=True)
class Served:
    """A tuned model that is ready to answer, and how it is to be asked."""

    directory: Path
    contract: Serving
    model: Any
    collator: MultimodalCollator


def load_served(directory: Path, *, base: str | None = None, use_cpu: bool = False, trust_remote_code: bool = False) -> Served:
    """The model of a run's directory or of a merged one, in the dtype and quantisation that it was trained in.

    Args:
        directory: with a contract.
        base: hub id or directory of an adapter's base, if it is no longer where it was trained.
        use_cpu: leave a GPU alone.
        trust_remote_code: run the code of a checkpoint that comes with its own.

    Raises:
        ModelError: no contract, files that do not keep it, or a model that cannot be loaded.

    """
    found, family, processor = read_kept(directory, base=base, trust_remote_code=trust_remote_code)
    collator = MultimodalCollator(processor, family, train_on_inputs=True, chat_template=processor.chat_template)
    read = _with_adapter if found.kind == "adapter" else _merged
    return Served(directory, found, read(found, directory, family, use_cpu=use_cpu), collator)


def read_kept(
    directory: Path, *, base: str | None = None, trust_remote_code: bool = False
) -> tuple[Serving, Family, Processor]:
    """A directory's contract, its model's family and its processor, if the files are what the contract says.

    Raises:
        ModelError: no contract, files that do not keep it, or code in it that nobody has allowed to run.

    """
    found = read_serving(directory, base=base)
    check_trust(found.model, directory, trust_remote_code=trust_remote_code)
    family = find_family(found.model.family)
    processor = read_processor(found.model, family, directory)
    if wrong := faults(found, directory, processor):
        raise ModelError(f"{directory} is not as it was trained: {'; '.join(wrong)}")
    return found, family, processor


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
