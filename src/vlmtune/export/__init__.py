"""A merged model in other forms: `export_model`, and `python -m vlmtune.export MERGED OUT --format ...`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmtune.console import decisions
from vlmtune.errors import ModelError, OutputError
from vlmtune.output import MARK, claim, whole
from vlmtune.plugins import did_you_mean

if TYPE_CHECKING:
    from vlmtune.export.quantised import Losses

FORMATS = ("state_dict", "nf4", "int8", "gguf")
WEIGHTS = {".pth", ".safetensors", ".gguf"}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    out_dir: Path
    format: str
    files: tuple[str, ...]  # of weights
    bytes_before: int  # of the merged model's weights
    bytes_after: int
    losses: Losses | None = None  # of nf4 and int8
    ignored: tuple[str, ...] = ()  # tensors that were left out, as transformers reads over them; llama.cpp leaves out its own


def export_model(
    merged_dir: str | Path,
    out_dir: str | Path,
    *,
    format: str = "state_dict",
    rows: int = 8,
    llama_cpp: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Writes a merged model in another form, whole or not at all.

    Args:
        merged_dir: what `merge_adapter` wrote.
        out_dir: a directory that does not exist or is empty.
        format: "state_dict", one file of `torch.save`, for LLaMA as Meta's code reads it; "nf4" or "int8", a quantised
            copy that plain `from_pretrained` loads; "gguf", for llama.cpp.
        rows: of the recipe's held-out rows, or of its training rows, on which nf4 and int8 are compared with what they were
            made of; 0 takes a probe with a picture.
        llama_cpp: llama.cpp's sources, for gguf.
        overwrite: delete an earlier export that lies in `out_dir`.
        trust_remote_code: run Python that lies in the model's directory. A recipe beside it cannot allow that.

    Raises:
        ModelError: no merged model, or one that cannot be had in this form.
        DatasetError: the recipe's rows cannot be read.
        OutputError: `out_dir` is not empty, or the disk is full.

    """
    from vlmtune.export.gguf import write_gguf
    from vlmtune.export.merged import open_merged
    from vlmtune.export.quantised import write_quantised
    from vlmtune.export.state_dict import write_state_dict
    from vlmtune.serving import copy_serving

    if format not in FORMATS:
        raise ModelError(f"format {format!r} is none of {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}")
    merged_dir, out_dir = Path(merged_dir), Path(out_dir)
    with _code_of_its_own(merged_dir):
        merged = open_merged(merged_dir, trust_remote_code=trust_remote_code)
    if out_dir.resolve() in (merged.directory.resolve(), *merged.directory.resolve().parents):
        raise OutputError(f"output directory {out_dir} holds the merged model itself: name another one")
    claim(out_dir, overwrite=overwrite)
    losses = None
    with whole(out_dir, replace=overwrite) as partial, _code_of_its_own(merged_dir):
        (partial / MARK).touch()
        if format == "state_dict":
            write_state_dict(merged, partial)
        elif format == "gguf":
            write_gguf(merged, partial, Path(llama_cpp) if llama_cpp else None)
        else:
            losses = write_quantised(merged, partial, format, rows)
            copy_serving(merged_dir, partial, out_dir, quantization="nf4" if format == "nf4" else "int8")
        written = sorted(path for path in partial.iterdir() if path.suffix in WEIGHTS)
        names, size = tuple(path.name for path in written), sum(path.stat().st_size for path in written)
    ignored = () if format == "gguf" else merged.ignored
    return ExportReport(out_dir, format, names, merged.bytes, size, losses, ignored)


@contextmanager
def _code_of_its_own(directory: Path) -> Generator[None]:
    """Says in one sentence that a model needs its own Python, whichever of its files asks for it."""
    try:
        yield
    except (ModelError, ValueError) as error:
        if "trust_remote_code" not in f"{error} {error.__cause__}":  # ours is one short line, transformers' own has it
            raise
        raise ModelError(
            f"{directory} comes with Python of its own, which is not run unasked: read it, and allow it with "
            "--trust-remote-code (in Python trust_remote_code=True)"
        ) from error


def command(
    merged: Annotated[Path, typer.Argument(help="A merged model's directory.")],
    out: Annotated[Path, typer.Argument(help="Where the export is written.")],
    format: Annotated[str, typer.Option(help="state_dict, nf4, int8 or gguf.")] = "state_dict",
    rows: Annotated[int, typer.Option(help="Rows on which nf4 and int8 are measured; 0: a probe.", min=0)] = 8,
    llama_cpp: Annotated[Path | None, typer.Option(help="llama.cpp's sources, for gguf.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier export in OUT.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run Python that lies in MERGED.")] = False,
) -> None:
    """Write a merged model as a PyTorch state dict, quantised, or as GGUF."""
    options: dict[str, Any] = {"format": format, "rows": rows, "llama_cpp": llama_cpp, "overwrite": overwrite}
    decisions("Exported", _told(export_model(merged, out, **options, trust_remote_code=trust_remote_code)))


def _told(report: ExportReport) -> dict[str, str]:
    share = report.bytes_after / report.bytes_before
    told = {
        "weights": ", ".join(report.files),
        "size": f"{report.bytes_after / 1e6:,.1f} MB, {share:.0%} of the {report.bytes_before / 1e6:,.1f} MB before",
    }
    if report.ignored:
        first, *others = report.ignored
        told["left out"] = f"{first}{f' and {len(others)} more' if others else ''}, which transformers ignores"
    if losses := report.losses:
        told["loss"] = f"{losses.after:.4f}, {losses.after - losses.before:+.4f}, on {losses.rows}"
        told |= {} if losses.logits is None else {"logits": f"differ by up to {losses.logits:.3g}"}
    return {**told, "directory": str(report.out_dir)}
