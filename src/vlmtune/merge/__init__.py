"""Merging an adapter into its base: `merge_adapter`, and `python -m vlmtune.merge ADAPTER OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peft import PeftConfig

from vlmtune.collator import MultimodalCollator
from vlmtune.console import decisions
from vlmtune.errors import ModelError, OutputError
from vlmtune.families import Family, find_family
from vlmtune.merge.adapter import read_adapter
from vlmtune.merge.beside import Beside, fingerprint
from vlmtune.merge.stream import lay_out, make_room, write_weights
from vlmtune.merge.verify import check_answers, check_files, check_weights
from vlmtune.merge.weights import stored
from vlmtune.model import compute_dtype, load_config, read_model, read_processor, skeleton, weight_files
from vlmtune.output import claim, resumable
from vlmtune.recipe import ModelSection, load_recipe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    out_dir: Path
    modules: int  # weights that the adapter changed
    largest_change: float  # of any one weight
    largest_difference: float  # between a weight of base + adapter and of the merged model
    logits_difference: float | None = None  # between the answers of both, where both were asked


def merge_adapter(
    adapter_dir: str | Path,
    out_dir: str | Path,
    *,
    base: str | None = None,
    family: Family | str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: Literal["weights", "full"] = "weights",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> MergeReport:
    """Merges an adapter into its unquantised base and writes a directory that plain `from_pretrained` loads.

    The base's files are gone through once, tensor by tensor: scale · B A is added in float32, rounded once, and written. No
    model is built, and memory does not grow with it. The directory holds weights, config, processor with the template that was
    trained, generation config and a manifest with hashes; it appears whole or not at all. Before it does, every changed
    weight is read back and a piece of it compared with base + adapter. A merge that is killed goes on where it was.

    Args:
        adapter_dir: a run's directory, or any PEFT LoRA adapter.
        out_dir: a directory that does not exist or is empty.
        base: hub id or directory of the base, if it is no longer where the adapter says.
        family: the `Family` that it was trained with, if that is neither the recipe's nor told by the checkpoint.
        dtype: of the merged weights: "bfloat16", "float16" or "float32"; None keeps the checkpoint's own.
        max_shard_size: of one weight file.
        verify: "full" also loads base + adapter and the merged model, one after the other, and compares their answers.
        trust_remote_code: run code that lies with the base, where the adapter's recipe says that it needs that.
        overwrite: delete an earlier merge that lies in `out_dir`, once the new one is whole.

    Raises:
        ModelError: the adapter matches no weight of the base or changes nothing, or the merged model is not base + adapter.
        OutputError: `out_dir` is not empty, or the disk has no room.

    """
    adapter_dir, out_dir = Path(adapter_dir), Path(out_dir)
    if dtype not in (None, *DTYPES):
        raise ModelError(f"dtype {dtype!r} is none of bfloat16, float16 and float32")
    chosen = DTYPES.get(dtype or "")
    section = _base_section(adapter_dir, base)
    if section.trust_remote_code and not trust_remote_code:
        raise ModelError(f"{section.name} needs code of its own to be run: look at it, then say --trust-remote-code")
    _apart(out_dir, adapter_dir, Path(section.name))
    claim(out_dir, overwrite=overwrite)
    adapter = read_adapter(adapter_dir)
    config = load_config(section)
    if getattr(config, "quantization_config", None):
        raise ModelError(f"the base {section.name} is quantised: name the one that is not, as `base`")
    found = find_family(family or section.family, config=config)
    processor = read_processor(section, found, adapter_dir if (adapter_dir / "tokenizer_config.json").exists() else None)
    collator = MultimodalCollator(processor, found, train_on_inputs=True)
    model = skeleton(section, found, config)
    files = weight_files(section)
    layout = lay_out(
        [tensor for path in files for tensor in stored(path)], adapter, model, dtype=chosen, max_shard_size=max_shard_size
    )
    with resumable(out_dir, fingerprint(layout, adapter), replace=overwrite) as unfinished:
        make_room(layout, unfinished)
        written = write_weights(layout, adapter, unfinished)
        beside = Beside(unfinished.directory, out_dir, section, found, adapter, files[0].parent)
        beside.write(config, model, processor, layout, collator.stop_token_id, base=base, dtype=chosen)
        check_files(layout, unfinished.directory)
        difference = check_weights(layout, adapter, model, unfinished.directory)
        beside.check(processor, layout, collator.stop_token_id)
        logits = None
        if verify == "full":
            logits = check_answers(section, collator, adapter, unfinished.directory, chosen)
        beside.write_manifest(written)
    moved = [change for change in written.largest.values() if change]
    return MergeReport(out_dir, len(moved), max(moved), difference, logits)


def _apart(out_dir: Path, *sources: Path) -> None:
    """Refuses to write where the adapter or its base lies, or above."""
    for source in (path.resolve() for path in sources if path.exists()):
        if out_dir.resolve() in (source, *source.parents):
            raise OutputError(f"output directory {out_dir} is or holds what the merge is made of ({source}): name another one")


def load_merged(directory: Path, section: ModelSection, family: Family) -> Any:
    """A merged model, ready to answer: in the recipe's dtype, on the GPU as far as it fits there."""
    return read_model(section, family, directory, dtype=compute_dtype(section), device_map="auto").eval()


def _base_section(adapter_dir: Path, base: str | None) -> ModelSection:
    """Where the base is, by the recipe that lies with the adapter or by the adapter's own config."""
    if not adapter_dir.is_dir():
        raise ModelError(f"there is no directory {adapter_dir}: name a run's, or that of a PEFT adapter")
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


def command(
    adapter: Annotated[Path, typer.Argument(help="A run's directory, or any PEFT LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="Where the merged model is written.")],
    base: Annotated[str | None, typer.Option(help="Hub id or directory of the base, if it has moved.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; the checkpoint's own if left out.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one weight file.")] = "5GB",
    verify: Annotated[str, typer.Option(help="weights, or full: compare the answers of the two whole models too.")] = "weights",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that lies with the base, where it needs that.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier merge in OUT.")] = False,
) -> None:
    """Merge an adapter into its unquantised base, in little memory, and prove that the result is base + adapter."""
    if verify not in ("weights", "full"):
        raise ModelError(f"--verify {verify} is neither weights nor full")
    report = merge_adapter(
        adapter,
        out,
        base=base,
        dtype=dtype,
        max_shard_size=max_shard_size,
        verify=verify,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    shown = {
        "weights": f"{report.modules} changed, by up to {report.largest_change:.3g}",
        "verified": f"they equal base + adapter, rounded once (by up to {report.largest_difference:.3g})",
    }
    if report.logits_difference is not None:
        shown["logits"] = f"equal those of base + adapter but for what that rounding does ({report.logits_difference:.3g})"
    decisions("Merged", {**shown, "model": report.out_dir})
