"""Which tensor of the merged model comes from where, and the files that are written by that."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from vlmtune.console import progress
from vlmtune.errors import ModelError, OutputError
from vlmtune.merge.adapter import Adapter, Change, Part, changes, parts
from vlmtune.merge.weights import AHEAD, Entry, Stored, ahead, pieces, room, write
from vlmtune.model import parameter_names
from vlmtune.output import Unfinished, sha256

PIECE = 2**16  # weights that are changed at once: in float32 and with what is made on the way, they stay in a core's cache
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Target:
    """A tensor of the merged model."""

    entry: Entry
    source: Stored
    parameter: str | None = None  # the model's own name for it, where something changes it
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The merged model's tensors, file by file."""

    files: Mapping[str, Sequence[Target]]
    untied: bool = False  # embeddings and head were one weight in the base and are two now

    @property
    def targets(self) -> list[Target]:
        return list(itertools.chain.from_iterable(self.files.values()))

    @property
    def changed(self) -> list[Target]:
        return [target for target in self.targets if target.parts]

    @property
    def bytes(self) -> int:
        return sum(target.entry.bytes for target in self.targets)


def lay_out(
    base: Sequence[Stored],
    adapter: Adapter,
    model: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> Layout:
    """The merged model, planned: the base's tensors under the base's names, in its order.

    Args:
        model: the base without weights.
        dtype: of all that is not an integer; None keeps what each tensor has.

    Raises:
        ModelError: a tensor of the adapter that bears on none of the base.

    """
    names = parameter_names(model, [tensor.name for tensor in base])
    tied: Mapping[str, str] = model.all_tied_weights_keys
    bearing = _bearing(adapter, model, {name for name in names.values() if name} | set(tied))
    apart = {} if adapter.config.ensure_weight_tying else _torn_apart(bearing, tied)
    for name, source in tied.items():  # those that stay one change as one
        if name not in apart and (both := bearing.get(source) or bearing.get(name)):
            bearing[source] = bearing[name] = both
    targets = [_target(tensor.name, tensor, names[tensor.name], bearing, dtype) for tensor in base]
    stored = {names[tensor.name]: tensor for tensor in base}
    missing = [name for name in apart if name not in stored]
    targets += [_target(name, stored[apart[name]], name, bearing, dtype) for name in missing]
    return Layout(_shards(targets, size_in_bytes(max_shard_size)), untied=bool(apart))


def _bearing(adapter: Adapter, model: PreTrainedModel, there: set[str]) -> dict[str, tuple[Part, ...]]:
    """The parts of the adapter by the model's parameter; each of its tensors has found one."""
    found = parts(adapter)
    renamed = parameter_names(model, [part.parameter for part in found])
    bearing: dict[str, tuple[Part, ...]] = {}
    astray: list[str] = []
    for part in found:
        name = renamed[part.parameter]
        if name is None or name not in there:
            astray += part.names.values()
        elif earlier := bearing.get(name):
            raise ModelError(
                f"the adapter in {adapter.directory} has two tensors for the same, under an older and a newer name: "
                f"{min(earlier[0].names.values())} and {min(part.names.values())}"
            )
        else:
            bearing[name] = (part,)
    if astray:
        listed = ", ".join(sorted(astray)[:20]) + (", …" if len(astray) > 20 else "")
        raise ModelError(
            f"{len(astray)} of {len(adapter.names)} tensors of the adapter in {adapter.directory} match no weight of its base: "
            f"it was trained on another model, or on one whose weights are stored in another shape ({listed})"
        )
    return bearing


def _torn_apart(bearing: Mapping[str, tuple[Part, ...]], tied: Mapping[str, str]) -> dict[str, str]:
    """Tied weights of which the adapter changes one and not the other, so that the merged model has two.

    Trained tokens are PEFT's exception: it keeps them the same in both.
    """

    def kinds(name: str) -> set[str]:
        return {kind for part in bearing.get(name, ()) for kind in part.names} - {"tokens"}

    return {name: source for name, source in tied.items() if bool(kinds(name)) or bool(kinds(source))}


def _target(
    name: str, source: Stored, parameter: str | None, bearing: Mapping[str, tuple[Part, ...]], dtype: torch.dtype | None
) -> Target:
    kept = dtype if dtype is not None and source.dtype.is_floating_point else source.dtype
    return Target(Entry(name, source.shape, kept), source, parameter, bearing.get(parameter or "", ()))


def _shards(targets: Sequence[Target], limit: int) -> dict[str, list[Target]]:
    """The targets in files of at most `limit` bytes each, one tensor at least."""
    files: list[list[Target]] = []
    room = 0
    for target in targets:
        if target.entry.bytes > room or not files:
            files.append([])
            room = limit
        files[-1].append(target)
        room -= target.entry.bytes
    if len(files) == 1:
        return {SAFE_WEIGHTS_NAME: files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": file for number, file in enumerate(files, 1)}


def size_in_bytes(text: str) -> int:
    """`5GB` → 5000000000, `512MiB` → 536870912.

    Raises:
        ModelError: no such size.

    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.strip().upper())
    if not found or float(found[1]) == 0:
        raise ModelError(f"max_shard_size {text!r} is no size: write it as 5GB or 500MB")
    return int(float(found[1]) * UNITS[found[2]])


def fingerprint(layout: Layout, adapter: Adapter) -> str:
    """All that the weights of a merge depend on, in a word."""
    sources = {target.source.path for target in layout.targets}
    content = {
        "vlmtune": version("vlmtune"),
        "base": sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sources),
        "adapter": [sha256(adapter.path), sha256(adapter.directory / "adapter_config.json")],
        "files": {name: [str(target.entry) for target in targets] for name, targets in layout.files.items()},
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_room(layout: Layout, unfinished: Unfinished) -> None:
    """Makes sure that the disk holds what is still to be written.

    Raises:
        OutputError: it does not.

    """
    there = sum(path.stat().st_size for path in unfinished.directory.iterdir() if path.is_file())
    needed, free = layout.bytes - there, shutil.disk_usage(unfinished.directory).free
    place = unfinished.directory.parent
    if needed > free:
        raise OutputError(
            f"the merged model needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free in {place}: "
            "make room or name another place"
        )


@dataclass
class Written:
    """What the files hold."""

    hashes: dict[str, str] = field(default_factory=dict[str, str])  # SHA-256 by file
    moved: dict[str, float] = field(default_factory=dict[str, float])  # weights that changed, and how far the most


def write_weights(layout: Layout, adapter: Adapter, unfinished: Unfinished) -> Written:
    """Writes the files that are not finished yet, one after the other, and their index.

    Raises:
        ModelError: no weight has changed.

    """
    written = Written()
    with _undisturbed(), progress() as shown:
        task = shown.add_task("Merging (MB)", total=layout.bytes / 1e6, text="")
        for name, targets in layout.files.items():
            if name in unfinished.finished:
                shown.advance(task, sum(target.entry.bytes for target in targets) / 1e6)
            else:
                moved: dict[str, float] = {}
                with closing(_merged(targets, adapter, moved)) as blocks:
                    seen = (shown.advance(task, block.nbytes / 1e6) or block for block in blocks)
                    digest = write(unfinished.directory / name, [target.entry for target in targets], seen)
                unfinished.done(name, {"sha256": digest, "moved": moved})
            written.hashes[name] = unfinished.finished[name]["sha256"]
            written.moved |= {weight: most for weight, most in unfinished.finished[name]["moved"].items() if most}
    if not written.moved:
        raise ModelError("the adapter changes no weight of its base: it was never trained, or its weights were not saved")
    _write_index(layout, unfinished.directory)
    return written


@contextmanager
def _undisturbed() -> Generator[None]:
    """Keeps torch from dividing pieces as small as these among threads, and Python from looking for cycles between them."""
    count, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(count)
        if collecting:
            gc.enable()


def _merged(targets: Iterable[Target], adapter: Adapter, moved: dict[str, float]) -> Generator[Tensor]:
    """The blocks of a file's tensors, changed and rounded once; notes how far each weight moved.

    Raises:
        ModelError: a weight is no number, or too large for its dtype.

    """
    memory = pieces(AHEAD + 1)
    made: list[Change] = []
    with closing(ahead(_blocks(targets))) as blocks:
        for target, first, rows in blocks:
            name, dtype = target.entry.name, target.entry.dtype
            if first == 0:
                made = [change for part in target.parts for change in changes(adapter, part, target.source.shape)]
            if not made and dtype == rows.dtype:
                yield rows
                continue
            written = room(memory, rows.numel() * dtype.itemsize).view(dtype).view(rows.shape)
            most = _change(rows, first, made, written)
            if not math.isfinite(most):
                raise ModelError(f"the adapter makes {name} something that is no number, or too large for {dtype}")
            if made:
                moved[name] = max(most, moved.get(name, 0.0))
            yield written


def _blocks(targets: Iterable[Target]) -> Iterator[tuple[Target, int, Tensor]]:
    memory = pieces(2 * AHEAD + 2)  # a block waits to be changed, and where it is not, to be written
    for target in targets:
        source = target.source
        if not target.parts:  # rows do not matter, and those of fused experts are larger than a piece
            source = replace(source, shape=(math.prod(source.shape),))
        for first, rows in source.blocks(memory):
            yield target, first, rows


def _change(rows: Tensor, first: int, made: Sequence[Change], written: Tensor) -> float:
    """Writes the rows after all changes, and says how far the one moved that moved most; no number where one is none."""
    step = max(1, PIECE // max(1, rows.shape[1]))
    memory = torch.empty(2, step, rows.shape[1])
    moved = torch.zeros(())
    for start in range(0, len(rows) if rows.numel() else 0, step):
        here = slice(start, start + step)
        before, now = memory[:, : len(rows[here])]
        after = before.copy_(rows[here])
        for change in made:
            after = change(after, first + start)
        written[here] = after
        if written.dtype != rows.dtype:
            before.copy_(before.to(written.dtype))
        least, most = torch.aminmax(now.copy_(written[here]).sub_(before))
        moved = torch.maximum(moved, torch.maximum(-least, most))  # which keeps NaN
    return moved.item()


def _write_index(layout: Layout, directory: Path) -> None:
    if len(layout.files) == 1:
        return
    weight_map = {target.entry.name: name for name, targets in layout.files.items() for target in targets}
    content: dict[str, Any] = {"metadata": {"total_size": layout.bytes}, "weight_map": weight_map}
    (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
