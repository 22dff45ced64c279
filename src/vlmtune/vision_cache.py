"""Every picture goes through a frozen vision tower once; later epochs, later runs and evaluations read what came out."""

from __future__ import annotations

import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import transformers
from peft import PeftModel
from PIL.Image import Image
from torch import Tensor

from vlmtune.ahead import ahead
from vlmtune.collator import MultimodalCollator, pictures
from vlmtune.console import progress
from vlmtune.data import Rows, spread
from vlmtune.errors import ImageError, RecipeError
from vlmtune.features import FeatureStore, tower_key
from vlmtune.model import encoded, evaluating, on_device
from vlmtune.output import cache_directory, existing
from vlmtune.proof import features_fault
from vlmtune.recipe import LoraSection, VisionCacheSection
from vlmtune.records import Records

NOT_SEEN = {"_name_or_path", "transformers_version", "quantization_config"}  # what of a config does not touch the tower
Place: TypeAlias = tuple[Rows, int, int]  # where a picture stands: position of its row, its number in there
SAMPLED = 1000  # pictures
WRITTEN_AT_ONCE = 64 * 2**20  # bytes of features in a file
MOST_AT_ONCE = 1024  # features in a file: many small ones would leave the memory in pieces


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
    found, uses = _distinct(collator, parts)
    if not found:
        return None, "off: no row has a picture"
    directory = _directory(section, model, collator)
    on_disk = FeatureStore(directory)
    missing = processes.agree(_absent(found, on_disk))
    if section.mode == "auto" and missing and passes <= 1 and uses == len(found):
        return None, "off: the run goes through the pictures once"
    tower = _Tower(model, collator, on_disk)
    rows, position, _ = found[found.key(0)]
    if fault := processes.agree(features_fault(model, collator, rows[position], tower.known)):
        if section.mode != "auto":
            raise RecipeError(f"`vision_cache` is {section.mode}, and {fault}")
        return None, f"off: {fault}"
    size = _size(tower, found)
    budgets = processes.agree(_budgets(section, directory, processes.world))
    place, reason = _place(section, size, budgets, all_there=not missing, world=processes.world)
    if place == "off":
        return None, reason
    store = on_disk if place == "disk" else FeatureStore()
    _complete(store, tower, found, missing, processes)
    damaged = f", {len(on_disk.damaged)} damaged files left aside" if on_disk.damaged else ""
    before = f", {len(found) - len(missing)} known before" if len(missing) < len(found) else ""
    where = f" in {directory}" if place == "disk" else ""
    return store, f"{place}: {len(found)} pictures{before}, about {_human(size)}{where}{damaged}"


class _Pictures(Mapping[str, Place]):
    """Fingerprint → where a picture stands first."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._places = Records("iii")  # part, position of a row in it, number of a picture in that

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return map(self.key, range(len(self)))

    def __getitem__(self, key: str) -> Place:
        part, position, number = self._places[bytes.fromhex(key)]
        return self._parts[part], position, number

    def key(self, number: int) -> str:
        return self._places.key(number).hex()

    def enter(self, key: str, part: int, position: int, number: int) -> None:
        if (known := bytes.fromhex(key)) not in self._places:
            self._places[known] = part, position, number


class _Tower:
    """What sees, and what it has made of pictures before."""

    def __init__(self, model: PeftModel, collator: MultimodalCollator, kept: FeatureStore) -> None:
        self.collator, self.kept = collator, kept
        self._model = model
        self.on_gpu = model.device.type != "cpu"

    def encode(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """The features of the pictures whose pixels a batch holds."""
        with evaluating(self._model):
            return encoded(self._model, self.collator.family, on_device(batch, self._model))

    def known(self, sources: Sequence[Any]) -> list[Tensor]:
        """The features of these pictures; those that are kept are read."""
        keys = map(self.collator.album.fingerprint, sources)
        return [
            self.kept[key] if key in self.kept else self.encode(self.collator.pictures([source]))[0]
            for key, source in zip(keys, sources, strict=True)
        ]


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


def _distinct(collator: MultimodalCollator, parts: Sequence[Rows]) -> tuple[_Pictures, int]:
    """The pictures, each once; and how many there are with repetitions.

    Not the pictures themselves: in rows of a Parquet file they are bytes, which would all come into memory.
    """
    found, uses = _Pictures(parts), 0
    places: deque[tuple[int, int, int]] = deque()  # of the pictures that are being read

    def sources() -> Iterator[Any]:
        for part, rows in enumerate(parts):
            for position in range(len(rows)):
                for number, source in enumerate(pictures(rows[position])):
                    places.append((part, position, number))
                    yield source
                shown.advance(task)

    with progress() as shown:
        task = shown.add_task("Looking through pictures", total=sum(map(len, parts)), text="")
        for key in collator.album.fingerprints(sources()):
            found.enter(key, *places.popleft())
            uses += 1
    return found, uses


def _source(place: Place) -> Any:
    rows, position, number = place
    return pictures(rows[position])[number]


def _directory(section: VisionCacheSection, model: PeftModel, collator: MultimodalCollator) -> Path:
    """A directory for this tower with these settings: features of others are never found in it."""
    root = Path(section.directory).expanduser() if section.directory else cache_directory() / "features"
    base: Any = model.get_base_model()
    config = {key: value for key, value in base.config.to_dict().items() if key not in NOT_SEEN}
    pixels = collator.processor.image_processor.to_dict()
    settings = {"pixels": pixels, "config": config, "dtype": str(base.dtype), "transformers": transformers.__version__}
    return root / tower_key(_tower(base.base_model, collator), settings)


def _size(tower: _Tower, found: _Pictures) -> int:
    """Bytes of the features of all pictures, told from one that is known and from the lengths of the others.

    Of more than `SAMPLED` pictures, so many are asked: each size that is new takes a call of the processor.
    """
    asked = [found[found.key(number)] for number in spread(range(len(found)), SAMPLED)]
    first = _source(asked[0])
    each = tower.known([first])[0].nbytes / max(tower.collator.feature_length(first), 1)
    return round(each * sum(tower.collator.feature_length(_source(place)) for place in asked) * len(found) / len(asked))


def _budgets(section: VisionCacheSection, directory: Path, world: int) -> dict[str, int]:
    """Bytes that features may take in the memory of each process and on the disk."""
    if section.budget is not None:
        return dict.fromkeys(("memory", "disk"), int(section.budget * 2**30))
    free = shutil.disk_usage(existing(directory)).free
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


def _complete(store: FeatureStore, tower: _Tower, found: _Pictures, missing: Sequence[int], processes: Processes) -> None:
    """Brings all pictures' features into the store: on the disk each process encodes a share, in memory each has all."""
    on_disk = store is tower.kept
    if not on_disk:
        for key in filter(tower.kept.__contains__, found):  # one by one: all at once would lie in memory twice
            store.add({key: tower.kept[key]})
    processes.wait()  # all have read the directory: now they may write
    _fill(store, tower, found, missing[processes.rank :: processes.world] if on_disk else missing)
    processes.wait()
    store.refresh()
    _fill(store, tower, found, _absent(found, store))  # they lie on another machine's disk


def _absent(found: _Pictures, store: FeatureStore) -> Sequence[int]:
    """The numbers of the pictures that a store lacks."""
    return array("q", (number for number, key in enumerate(found) if key not in store))


def _fill(store: FeatureStore, tower: _Tower, found: _Pictures, numbers: Sequence[int]) -> None:
    if not numbers:
        return
    with progress() as shown:
        task = shown.add_task("Encoding pictures", total=len(numbers), text="")
        pending: dict[str, Tensor] = {}
        size = 0  # bytes pending
        for keys, batch in _batches(tower.collator, found, numbers, on_gpu=tower.on_gpu):
            features = tower.encode(batch)
            pending |= {key: feature.cpu() for key, feature in zip(keys, features, strict=True)}
            size += sum(feature.nbytes for feature in features)
            if size > WRITTEN_AT_ONCE or len(pending) > MOST_AT_ONCE:
                store.add(pending)
                pending, size = {}, 0
            shown.advance(task, len(keys))
        store.add(pending)


def _batches(
    collator: MultimodalCollator, found: _Pictures, numbers: Sequence[int], *, on_gpu: bool
) -> Iterator[tuple[Sequence[str], dict[str, Any]]]:
    """Keys and pixels of a few pictures at a time; while a GPU has these, others are made.

    A tower on a CPU takes all of its cores: threads beside it would make filling take 1.4 times as long.
    """

    def read(number: int) -> tuple[str, str, Any]:
        key = found.key(number)
        rows, position, _ = found[key]
        return key, rows.name(position), _source(found[key])

    def opened(picture: tuple[str, str, Any]) -> tuple[str, Image]:
        key, name, source = picture
        try:
            return key, collator.album.open(source)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None

    images, at_once = ahead(opened, map(read, numbers), None if on_gpu else 0), collator.family.pictures_at_once

    def made(_: int) -> tuple[Sequence[str], dict[str, Any]]:
        keys, some = zip(*islice(images, at_once), strict=True)
        return keys, collator.opened_pictures(some)

    starts = range(0, len(numbers), at_once)
    return ahead(made, starts, 1 if on_gpu else 0)  # two threads would set one tokenizer's padding at once


def _human(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
