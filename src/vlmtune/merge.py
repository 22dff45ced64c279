"""Merging an adapter into its base: `merge_adapter`, and `python -m vlmtune.merge ADAPTER OUT`."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GenerationConfig,
)

from vlmtune.collator import MultimodalCollator
from vlmtune.console import bar, command_line, decisions
from vlmtune.errors import ModelError
from vlmtune.families import Family, find_family
from vlmtune.model import compute_dtype, load_config, old_names_allowed, read_model, read_processor
from vlmtune.output import MARK, claim, whole
from vlmtune.recipe import ModelSection, load_recipe


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    out_dir: Path
    modules: int  # weights that the adapter changed
    largest_change: float  # of any one weight
    largest_difference: float  # between the logits of base + adapter and of the merged model, on a probe with a picture


def merge_adapter(
    adapter_dir: str | Path,
    out_dir: str | Path,
    *,
    base: str | None = None,
    family: Family | str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> MergeReport:
    """Merges an adapter into its unquantised base and writes a directory that plain `from_pretrained` loads.

    The directory holds weights, config, processor with the template that was trained, and generation config; it appears
    whole or not at all. Before it does, the merged weights are loaded back from it and compared with base + adapter.

    Args:
        adapter_dir: a run's directory, or any PEFT LoRA adapter.
        out_dir: a directory that does not exist or is empty.
        base: hub id or directory of the base, if it is no longer where the adapter says.
        family: the `Family` that it was trained with, if that is neither the recipe's nor told by the checkpoint.
        dtype: of the merged weights: "bfloat16", "float16" or "float32"; None keeps the checkpoint's own.
        max_shard_size: of one weight file.
        overwrite: delete an earlier merge that lies in `out_dir`.

    Raises:
        ModelError: the adapter matches no module of the base or changes nothing, or the merged model answers otherwise.
        OutputError: `out_dir` is not empty, or the disk is full.

    """
    adapter_dir, out_dir = Path(adapter_dir), Path(out_dir)
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ModelError(f"dtype {dtype!r} is none of bfloat16, float16 and float32")
    section = _base_section(adapter_dir, base)
    claim(out_dir, overwrite=overwrite)
    found = find_family(family or section.family, config=load_config(section))
    has_processor = (adapter_dir / "tokenizer_config.json").exists()
    processor = read_processor(section, found, adapter_dir if has_processor else None)
    model = read_model(section, found, dtype=dtype or "auto", device_map="cpu").eval()
    tuned = _with_adapter(model, adapter_dir)
    probe = _probe(MultimodalCollator(processor, found, train_on_inputs=True))
    before = _logits(tuned, probe)
    changes = _changes(tuned)
    merged: Any = tuned.merge_and_unload()
    _keep_generation_config(merged, adapter_dir)
    with whole(out_dir, replace=overwrite) as partial:
        (partial / MARK).touch()
        merged.save_pretrained(str(partial), max_shard_size=max_shard_size)
        processor.save_pretrained(str(partial))
        kept = merged.dtype
        del model, tuned, merged  # one model in memory at a time
        gc.collect()
        reloaded = read_model(section, found, partial, dtype=kept, device_map="cpu").eval()
        difference = (_logits(reloaded, probe) - before).abs().max().item()
        _refuse_other_answers(difference, before, kept)
    return MergeReport(out_dir, len(changes), max(changes.values()), difference)


def load_merged(directory: Path, section: ModelSection, family: Family) -> Any:
    """A merged model, ready to answer: in the recipe's dtype, on the GPU as far as it fits there."""
    return read_model(section, family, directory, dtype=compute_dtype(section), device_map="auto").eval()


def _base_section(adapter_dir: Path, base: str | None) -> ModelSection:
    """Where the base is, by the recipe that lies with the adapter or by the adapter's own config."""
    if not (adapter_dir / "adapter_config.json").exists():
        raise ModelError(f"{adapter_dir} holds no adapter: adapter_config.json is missing")
    if (adapter_dir / "recipe.yaml").exists():
        section = load_recipe(adapter_dir / "recipe.yaml").model
    else:
        try:
            config = PeftConfig.from_pretrained(str(adapter_dir))
        except (ValueError, TypeError) as error:
            raise ModelError(f"{adapter_dir} holds no adapter: adapter_config.json cannot be read ({error})") from error
        section = ModelSection(name=config.base_model_name_or_path or "?", revision=config.revision)
    return section.model_copy(update={"name": base, "revision": None}) if base else section


def _with_adapter(model: Any, adapter_dir: Path) -> PeftModel:
    """The model with the adapter, each of whose tensors has found its place."""
    try:
        with old_names_allowed():
            tuned = PeftModel.from_pretrained(model, str(adapter_dir))
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the adapter in {adapter_dir} does not fit its base: {' '.join(str(error).split())[:300]}") from error
    saved = _adapter_tensors(adapter_dir)
    loaded = get_peft_model_state_dict(tuned)
    astray = sorted(name for name in saved if name not in loaded or not _same(saved[name], loaded[name]))
    if astray or not saved:
        first = f", the first is {astray[0]}" if astray else ""
        raise ModelError(
            f"{len(astray)} of {len(saved)} tensors of the adapter in {adapter_dir} match no module of its base{first}: "
            "it was trained on another model or with another version of transformers"
        )
    return tuned


def _adapter_tensors(adapter_dir: Path) -> dict[str, Tensor]:
    path = adapter_dir / "adapter_model.safetensors"
    if path.exists():
        return load_file(path)
    if (adapter_dir / "adapter_model.bin").exists():
        return torch.load(adapter_dir / "adapter_model.bin", weights_only=True)
    raise ModelError(f"{adapter_dir} holds no adapter weights: adapter_model.safetensors is missing")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float(), other.cpu().float())


def _changes(tuned: PeftModel) -> dict[str, float]:
    """Largest change of a weight, by module.

    Raises:
        ModelError: nothing changes.

    """
    layers = [(n, m) for n, m in tuned.named_modules() if hasattr(m, "get_delta_weight") and hasattr(m, "lora_A")]
    changes = {name: _largest_change(module) for name, module in bar(layers, "Reading the adapter")}
    if not changes or max(changes.values()) == 0:
        raise ModelError("the adapter changes no weight of its base: it was never trained, or its weights were not saved")
    return changes


def _largest_change(module: Any) -> float:
    with torch.no_grad():
        return max((module.get_delta_weight(name).abs().max().item() for name in module.active_adapters), default=0.0)


def _probe(collator: MultimodalCollator) -> dict[str, Tensor]:
    """A question with a picture of noise: text and eyes both take part."""
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = [{"type": "image", "image": Image.fromarray(noise.numpy())}] if collator.family.takes_images else []
    question = {"role": "user", "content": [*picture, {"type": "text", "text": "What is this?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A probe."}]}
    batch = collator([{"messages": [question, answer]}])
    return {name: values for name, values in batch.items() if name != "labels"}


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        typed = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in batch.items()}
        return model(**typed).logits.float()


def _refuse_other_answers(difference: float, before: Tensor, dtype: torch.dtype) -> None:
    """A merged weight is rounded once, so that 16-bit logits move a little; more than that is another model."""
    allowed = max(1e-4, before.abs().max().item() * (1e-4 if dtype == torch.float32 else 0.1))
    if difference > allowed or difference != difference:
        raise ModelError(
            f"the merged model answers otherwise: its logits differ from base + adapter by up to {difference:.3g}, and "
            f"{allowed:.3g} is what rounding to {dtype} explains; nothing was written"
        )


def _keep_generation_config(model: Any, adapter_dir: Path) -> None:
    if (adapter_dir / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(adapter_dir))


def command(
    adapter: Annotated[Path, typer.Argument(help="A run's directory, or any PEFT LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="Where the merged model is written.")],
    base: Annotated[str | None, typer.Option(help="Hub id or directory of the base, if it has moved.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; the checkpoint's own if left out.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier merge in OUT.")] = False,
) -> None:
    """Merge an adapter into its unquantised base, and prove that the result answers the same."""
    report = merge_adapter(adapter, out, base=base, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    decisions(
        "Merged",
        {
            "modules": f"{report.modules} changed, by up to {report.largest_change:.3g}",
            "logits": f"differ from base + adapter by up to {report.largest_difference:.3g}",
            "model": report.out_dir,
        },
    )


if __name__ == "__main__":
    command_line(merge=command)
