"""A merged model as one file of `torch.save`, written from mapped memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from vlmtune.console import progress
from vlmtune.errors import ModelError
from vlmtune.export.llama import is_metas, params, to_meta
from vlmtune.export.merged import Merged
from vlmtune.output import write_json


def write_state_dict(merged: Merged, out: Path) -> None:
    """Writes consolidated.pth, whose names are those of the model's `state_dict()`.

    Of a LLaMA, consolidated.00.pth and params.json, with Meta's names and layout.

    Raises:
        ModelError: a weight that is not a parameter of the model.

    """
    merged.copy_rest(out)
    if is_metas(merged.config):
        write_json(out / "params.json", params(merged.config))
        _save(to_meta(_by_parameter(merged), merged.config), out / "consolidated.00.pth")
    else:
        _save(_by_parameter(merged), out / "consolidated.pth")


def _by_parameter(merged: Merged) -> dict[str, Tensor]:
    """The weights by the names of the model's state dict; tied ones under each of their names."""
    model, tensors = merged.outline, merged.weights()
    names = {name: merged.parameters[name] for name in tensors}
    expected = model.state_dict()
    astray = sorted(name for name, own in names.items() if own not in expected)
    if astray:
        raise ModelError(
            f"{merged.directory}: {astray[0]} is no parameter of a {type(model).__name__}: load it and save it anew"
        )
    found = {own: tensors[name] for name, own in names.items() if own}
    tied: Mapping[str, str] = model.all_tied_weights_keys
    found |= {name: found[source] for name, source in tied.items() if source in found and name not in found}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ModelError(f"{merged.directory} is not whole: {missing[0]} is in none of its files")
    return found


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Each tensor goes from the file that it is mapped from to the other one."""
    total = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())
    with progress() as shown, path.open("wb") as file:
        task = shown.add_task("Writing MB", total=total // 10**6, text="")
        torch.save(dict(tensors), _Watched(file, lambda: shown.update(task, completed=file.tell() // 10**6)))  # type: ignore[arg-type]


class _Watched:
    """A file, as far as `torch.save` uses it, that tells when something was written."""

    def __init__(self, file: BinaryIO, tell: Callable[[], None]) -> None:
        self.file, self.tell_progress = file, tell

    def write(self, data: bytes) -> int:
        count = self.file.write(data)
        self.tell_progress()
        return count

    def flush(self) -> None:
        self.file.flush()
