"""Every picture goes through a frozen vision tower once; later epochs, later runs and evaluations read what came out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import transformers
from peft import PeftModel
from torch import Tensor

from vlmtune.collator import MultimodalCollator, pictures
from vlmtune.console import progress
from vlmtune.data import Rows, spread
from vlmtune.errors import RecipeError
from vlmtune.features import FeatureStore, tower_key
from vlmtune.model import evaluating, on_device
from vlmtune.proof import features_fault
from vlmtune.recipe import LoraSection, VisionCacheSection

NOT_SEEN = {"_name_or_path", "transformers_version", "quantization_config"}  # what of a config does not touch the tower
AT_ONCE = 8  # pictures in one call of the tower
SAMPLED = 1000  # pictures
WRITTEN_AT_ONCE = 64 * 2**20  # bytes of features in a file


@dataclass(frozen=True)
class Processes:
    """Those that train together, and which of them this is."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None  # until all have come here
    agree: Callable[[Any], Any] = lambda value: value  # on the first process's


def keep_features(
    section: VisionCacheSection,
    lora: LoraSection,
    model: PeftModel,
    collator: MultimodalCollator,
    parts: Sequence[Rows],
    *,
    passes: float,
    processes: Processes,
) -> tuple[FeatureStore | None, str]:
    """The features of all pictures of these rows, where the recipe asks for them or where they pay.

    Args:
        section: the recipe's `vision_cache`.
        lora: the recipe's `lora`: a tower that is trained has no lasting features.
        model: on its device.
        collator: opens the pictures.
        parts: the rows whose pictures are wanted.
        passes: how often the run goes through the pictures.
        processes: each of several encodes a part of the pictures and reads the others' from the disk.

    Returns:
        The features, or None; and what was decided, and why, in a few words.

    Raises:
        RecipeError: features are asked for that this model cannot have, or that are larger than the budget.

    """
    obstacle = _obstacle(lora, model, collator)
    if section.mode == "off" or (obstacle and section.mode == "auto"):
        return None, f"off: {obstacle}" if obstacle and section.mode == "auto" else "off"
    if obstacle:
        raise RecipeError(f"`vision_cache` is {section.mode}, and {obstacle}")
    sources, uses = _distinct(collator, parts)
    if not sources:
        return None, "off: no row has a picture"
    directory = _directory(section, model, collator)
    on_disk = FeatureStore(directory)
    missing = processes.agree([key for key in sources if key not in on_disk])
    if section.mode == "auto" and missing and passes <= 1 and uses == len(sources):
        return None, "off: the run goes through the pictures once"

    def encode(asked: Sequence[Any]) -> list[Tensor]:
        return _encode(model, collator, asked)

    def known(asked: Sequence[Any]) -> list[Tensor]:
        keys = map(collator.album.fingerprint, asked)
        return [on_disk[key] if key in on_disk else encode([source])[0] for key, source in zip(keys, asked, strict=True)]

    row = next(rows[position] for rows in parts for position in range(len(rows)) if pictures(rows[position]))
    if fault := processes.agree(features_fault(model, collator, row, known)):
        if section.mode != "auto":
            raise RecipeError(f"`vision_cache` is {section.mode}, and {fault}")
        return None, f"off: {fault}"
    size = _size(known, collator, list(sources.values()))
    budgets = processes.agree(_budgets(section, directory, processes.world))
    place, reason = _place(section, size, budgets, all_there=not missing, world=processes.world)
    if place == "off":
        return None, reason
    store = on_disk if place == "disk" else FeatureStore()
    if place == "memory":
        store.add({key: on_disk[key] for key in sources if key in on_disk})
    processes.wait()  # all have read the directory: now they may write
    share = missing[processes.rank :: processes.world] if place == "disk" else missing
    _fill(store, encode, {key: sources[key] for key in share})
    processes.wait()
    store.refresh()
    if absent := {key: source for key, source in sources.items() if key not in store}:  # it lies on another machine's disk
        _fill(store, encode, absent)
    damaged = f", {len(on_disk.damaged)} damaged files left aside" if on_disk.damaged else ""
    before = f", {len(sources) - len(missing)} known before" if len(missing) < len(sources) else ""
    where = f" in {directory}" if place == "disk" else ""
    return store, f"{place}: {len(sources)} pictures{before}, about {_human(size)}{where}{damaged}"


def _obstacle(lora: LoraSection, model: PeftModel, collator: MultimodalCollator) -> str | None:
    """Why features cannot be kept, if they cannot."""
    if not collator.family.takes_images:
        return "the model takes no pictures"
    if lora.scope != "language":
        return f"the vision tower is trained (`lora.scope` is {lora.scope})"
    core: Any = model.get_base_model().base_model
    tower = _tower(core, collator)
    if not tower or any(weight.requires_grad for _, weight in tower):
        return "the model has no vision tower that is known and frozen"
    return None


def _tower(core: Any, collator: MultimodalCollator) -> list[tuple[str, Tensor]]:
    """Name and weight of all that sees."""
    sees = collator.family.sees
    return [(name, parameter) for name, parameter in core.named_parameters() if sees.match(name)]


def _distinct(collator: MultimodalCollator, parts: Sequence[Rows]) -> tuple[dict[str, Any], int]:
    """Fingerprint → where a picture is read from, each picture once; and how many there are with repetitions."""
    found: dict[str, Any] = {}
    uses = 0
    with progress() as shown:
        task = shown.add_task("Looking through pictures", total=sum(map(len, parts)), text="")
        for rows in parts:
            for position in range(len(rows)):
                for source in pictures(rows[position]):
                    found.setdefault(collator.album.fingerprint(source), source)
                    uses += 1
                shown.advance(task)
    return found, uses


def _directory(section: VisionCacheSection, model: PeftModel, collator: MultimodalCollator) -> Path:
    """A directory for this tower with these settings: features of others are never found in it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(section.directory).expanduser() if section.directory else cache / "vlmtune" / "features"
    base: Any = model.get_base_model()
    config = {key: value for key, value in base.config.to_dict().items() if key not in NOT_SEEN}
    pixels = collator.processor.image_processor.to_dict()
    settings = {"pixels": pixels, "config": config, "dtype": str(base.dtype), "transformers": transformers.__version__}
    return root / tower_key(_tower(base.base_model, collator), settings)


def _size(encode: Callable[[Sequence[Any]], list[Tensor]], collator: MultimodalCollator, sources: Sequence[Any]) -> int:
    """Bytes of the features of all pictures, told from one that is encoded and from the tokens of the others.

    Of more than `SAMPLED` pictures, so many are asked: each size that is new takes a call of the processor.
    """
    per_token = encode(sources[:1])[0].nbytes / max(collator.picture_tokens(sources[0]), 1)
    asked = spread(sources, SAMPLED)
    return round(per_token * sum(map(collator.picture_tokens, asked)) * len(sources) / len(asked))


def _budgets(section: VisionCacheSection, directory: Path, world: int) -> dict[str, int]:
    """Bytes that features may take in the memory of each process and on the disk."""
    if section.budget is not None:
        return dict.fromkeys(("memory", "disk"), int(section.budget * 2**30))
    free = shutil.disk_usage(_existing(directory)).free
    return {"memory": psutil.virtual_memory().available // 4 // world, "disk": free // 2}


def _place(section: VisionCacheSection, size: int, budgets: dict[str, int], *, all_there: bool, world: int) -> tuple[str, str]:
    """`memory`, `disk` or `off`, and why it is off."""
    if all_there and section.mode != "memory":
        return "disk", ""
    if section.mode != "auto":
        if size > budgets[section.mode]:
            raise RecipeError(
                f"`vision_cache` is {section.mode}, and the features take {_human(size)} where the budget is "
                f"{_human(budgets[section.mode])}: raise vision_cache.budget, lower images.max_pixels, or turn it off"
            )
        return section.mode, ""
    if world == 1 and size <= budgets["memory"]:  # several processes would each hold all of it
        return "memory", ""
    if size <= budgets["disk"]:
        return "disk", ""
    return "off", f"off: the features would take {_human(size)}, and the budget is {_human(max(budgets.values()))}"


def _fill(store: FeatureStore, encode: Callable[[Sequence[Any]], list[Tensor]], wanted: dict[str, Any]) -> None:
    """Encodes pictures, fingerprint → where it is read from, into the store."""
    if not wanted:
        return
    with progress() as shown:
        task = shown.add_task("Encoding pictures", total=len(wanted), text="")
        pending: dict[str, Tensor] = {}
        size = 0  # bytes pending
        for keys in _in_parts(list(wanted), AT_ONCE):
            features = encode([wanted[key] for key in keys])
            pending |= {key: feature.cpu() for key, feature in zip(keys, features, strict=True)}
            size += sum(feature.nbytes for feature in features)
            if size > WRITTEN_AT_ONCE:
                store.add(pending)
                pending, size = {}, 0
            shown.advance(task, len(keys))
        store.add(pending)


def _encode(model: PeftModel, collator: MultimodalCollator, sources: Sequence[Any]) -> list[Tensor]:
    core: Any = model.get_base_model().base_model
    with evaluating(model):
        return collator.family.encode(core, on_device(collator.pictures(sources), model))


def _in_parts(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _existing(directory: Path) -> Path:
    return next(path for path in (directory, *directory.absolute().parents) if path.exists())


def _human(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
