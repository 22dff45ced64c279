"""Merging an adapter into its base: `merge_adapter`, and `python -m vlmtune.merge ADAPTER OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlmtune.console import decisions
from vlmtune.errors import ModelError, OutputError
from vlmtune.output import MARK, claim, resumable
from vlmtune.recipe import ModelSection

if TYPE_CHECKING:
    from vlmtune.families import Family

DTYPES = ("bfloat16", "float16", "float32")


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
    _check_adapter(adapter_dir)

    # what takes seconds to import: mistakes are told before
    import torch

    from vlmtune.merge.adapter import read_adapter
    from vlmtune.merge.base import find_base, where
    from vlmtune.merge.beside import check_beside, write_beside, write_manifest
    from vlmtune.merge.stream import fingerprint, lay_out, make_room, write_weights
    from vlmtune.merge.verify import check_answers, check_files, check_weights
    from vlmtune.model import check_trust
    from vlmtune.serving import carry_serving

    chosen: torch.dtype | None = getattr(torch, dtype) if dtype else None
    adapter = read_adapter(adapter_dir)
    section = where(adapter, base)
    check_trust(section, section.name, trust_remote_code=trust_remote_code)
    _apart(out_dir, adapter.directory, Path(section.name))
    claim(out_dir, overwrite=overwrite)
    found = find_base(section, adapter, family)
    layout = lay_out(found.tensors, adapter, found.model, dtype=chosen, max_shard_size=max_shard_size)
    with resumable(out_dir, fingerprint(layout, adapter), replace=overwrite) as unfinished:
        partial = unfinished.directory
        make_room(layout, unfinished)
        written = write_weights(layout, adapter, unfinished)
        write_beside(partial, found, adapter, untied=layout.untied, dtype=chosen)
        carry_serving(adapter.directory, partial, out_dir, base=base, dtype=dtype)
        check_files(layout, partial)
        difference = check_weights(layout, adapter, found.model, partial)
        check_beside(partial, found, layout)
        logits = check_answers(partial, found, adapter, chosen) if verify == "full" else None
        write_manifest(partial, found, adapter, written)
        (partial / MARK).touch()
    return MergeReport(out_dir, len(written.moved), max(written.moved.values()), difference, logits)


def _check_adapter(directory: Path) -> None:
    if not directory.is_dir():
        raise ModelError(f"there is no directory {directory}: name a run's, or that of a PEFT adapter")
    if not (directory / "adapter_config.json").exists():
        raise ModelError(f"{directory} holds no adapter: adapter_config.json is missing")


def _apart(out_dir: Path, *sources: Path) -> None:
    """Refuses to write where the adapter or its base lies, or above."""
    for source in (path.resolve() for path in sources if path.exists()):
        if out_dir.resolve() in (source, *source.parents):
            raise OutputError(f"output directory {out_dir} is or holds what the merge is made of ({source}): name another one")


def load_merged(directory: Path, section: ModelSection, family: Family) -> Any:
    """A merged model, ready to answer: in the recipe's dtype, on the GPU as far as it fits there."""
    from vlmtune.model import compute_dtype, read_model

    return read_model(section, family, directory, dtype=compute_dtype(section), device_map="auto").eval()


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
