"""Pictures, lengths and the machine: what is known of a run from headers, numbers and settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from packaging.requirements import Requirement
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from vlmtune.checks import Check, Finding, Patient, failure, gib, named, ok, warning
from vlmtune.collator import pictures
from vlmtune.data import Rows
from vlmtune.images import original
from vlmtune.model import compute_dtype, sharing_obstacle
from vlmtune.recipe import ModelSection
from vlmtune.tools import beside

DOMINATES = 0.8  # share of a row's tokens
MANY = 1024  # tokens of a row's pictures: below that they cost little, whatever their share
BARS = "▁▂▃▄▅▆▇█"
BINS = 16
# settings of image processors and, where a tower has one to match, of its config
SETTINGS = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
    "max_image_tiles": "max_num_tiles",
}
WEIGHTS = {"nf4": 0.3, "int8": 0.55, "none": 1.0}  # of the bytes of a 16-bit checkpoint, in memory
TOO_LONG = {  # what each policy does, and what else would help
    "raise": (
        "the run is refused",
        "shorten them, lower images.max_pixels, raise train.max_length, or say `on_too_long: drop`",
    ),
    "drop": ("they are left out", "shorten them, lower images.max_pixels, or raise train.max_length"),
    "shrink": ("their pictures are made smaller, as far as that helps", "lower images.max_pixels, or raise train.max_length"),
}


def tower_settings(patient: Patient) -> Finding:
    """Patches are cut by the processor and counted by the tower: both have the number."""
    vision = getattr(patient.config, "vision_config", None)
    if not patient.takes_images or vision is None:
        return ok("the model takes no pictures")
    there = patient.collator.processor.image_processor
    compared: list[str] = []
    for name, of_tower in SETTINGS.items():
        given, wanted = _edge(getattr(there, name, None)), _edge(getattr(vision, of_tower, None))
        if given is None or wanted is None:
            continue
        compared.append(name)
        if given != wanted:
            return failure(
                f"the processor has {name} {given} and the vision tower {of_tower} {wanted}",
                "use the preprocessor_config.json that comes with these weights",
            )
    return ok(f"processor and vision tower agree in {', '.join(compared)}" if compared else "nothing that both would state")


def small_pictures(patient: Patient) -> Finding:
    vision = getattr(patient.config, "vision_config", None)
    patch = _edge(getattr(vision, "patch_size", None))
    if not patient.takes_images or patch is None:
        return ok("the model takes no pictures" if not patient.takes_images else "the size of a patch is not stated")
    least = patch * (getattr(vision, "spatial_merge_size", None) or 1)
    small: list[str] = []
    for row in patient.rows:
        for source in pictures(row):
            width, height = patient.collator.album.size(source)
            if min(width, height) < least:
                small.append(f"{row['name']} ({width}×{height})")
    if small:
        return warning(
            f"{named(small)}: smaller than the {least}×{least} pixels of one token", "leave them out, or find the originals"
        )
    return ok(f"none is smaller than the {least}×{least} pixels of one token")


def dominating_pictures(patient: Patient) -> Finding:
    if not patient.takes_images:
        return ok("the model takes no pictures")
    never = torch.tensor(sorted(patient.collator.family.image_token_ids(patient.collator.processor)))
    largest, dominated = 0.0, list[str]()
    for each in patient.encoded:
        seen = int(torch.isin(each.ids, never).sum())
        largest = max(largest, seen / len(each.ids))
        if seen > MANY and seen > DOMINATES * len(each.ids):
            dominated.append(f"{each.name} ({seen:,} of {len(each.ids):,} tokens)")
    if dominated:
        return warning(
            f"{named(dominated)}: the pictures are nearly all of the row",
            "lower images.max_pixels: tokens, memory and time fall with the area",
        )
    return ok(f"at most {largest:.0%} of a row's tokens")


def duplicates(patient: Patient) -> Finding:
    """A picture with several questions is fine; the same row twice is not."""
    first: dict[str, str] = {}
    repeated: list[str] = []
    seen: set[str] = set()
    rows, count = patient.split.train, 0
    shown: Counter[str] = Counter()  # all pictures of a row
    for position in patient.some(rows):
        row = rows[position]
        prints = [patient.collator.album.fingerprint(original(source)) for source in pictures(row)]
        count += len(prints)
        seen.update(prints)
        shown[" ".join(prints)] += bool(prints)
        texts = [part["text"] for message in row["messages"] for part in message["content"] if part["type"] == "text"]
        others = [beside(message) for message in row["messages"]]
        earlier = first.setdefault(repr((prints, texts, others)), rows.name(position))
        if earlier != rows.name(position):
            repeated.append(f"{rows.name(position)} (as {earlier})")
    if repeated:
        return warning(
            f"{named(repeated)}: the same pictures and texts again, {len(repeated)} rows in all",
            "leave repetitions out: they are learnt by heart",
        )
    packing, several = patient.recipe.packing, sum(count for count in shown.values() if count > 1)
    useful = several and packing.mode != "off" and not packing.group_by_image and not sharing_obstacle(patient.config)
    hint = f"; {several} rows show what others show: `packing.group_by_image` brings them together" if useful else ""
    return ok(f"no row stands twice; {count} pictures, {len(seen)} of them distinct{hint}")


def held_out_pictures(patient: Patient) -> Finding:
    """Accuracy on pictures that were trained on says nothing."""
    if patient.split.held_out is None or not patient.takes_images:
        return ok("no rows are held out" if patient.split.held_out is None else "the model takes no pictures")
    trained = _places(patient, patient.split.train)
    both = [(name, trained[key]) for key, name in _places(patient, patient.split.held_out).items() if key in trained]
    if both:
        shown = named([f"{held_out} (as {name})" for held_out, name in both])
        return warning(
            f"{len(both)} held-out pictures are trained on too: {shown}", "keep all rows of a picture on one side of the split"
        )
    return ok("no held-out picture is trained on")


def lengths(patient: Patient) -> list[Finding]:
    """Tokens of all rows, and what becomes of those over the limit."""
    if not patient.lengths:
        return [ok("no rows were counted")]
    limit = patient.collator.max_length
    counts = sorted(patient.lengths.values())
    few, half, most = (counts[round((len(counts) - 1) * share)] for share in (0.05, 0.5, 0.95))
    bound = f"limit {limit:,}" if limit else "no limit"
    shown = f"{chart(counts)}  5 % {few:,}, half {half:,}, 95 % {most:,}, longest {counts[-1]:,} tokens; {bound}"
    longer = [f"{name} ({count:,})" for name, count in patient.lengths.items() if limit is not None and count > limit]
    if not longer:
        return [ok(shown)]
    policy = patient.recipe.on_too_long
    then, remedy = TOO_LONG[policy]
    judge = failure if policy == "raise" or (policy == "drop" and len(longer) == len(counts)) else warning
    found = f"{len(longer)} of {len(counts)} rows are over the limit, {named(longer)}: `on_too_long` is {policy}, so {then}"
    return [ok(shown), judge(found, remedy)]


def versions(patient: Patient) -> Finding:
    wanted = [Requirement(text) for text in patient.machine.requires]
    wanted = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    old = [(each, there) for each in wanted if not each.specifier.contains(there := _version(each.name), prereleases=True)]
    if old:
        return failure(
            named([f"{each.name} is {there} and should be {each.specifier}" for each, there in old]),
            f"pip install --upgrade {' '.join(repr(f'{each.name}{each.specifier}') for each, _ in old)}",
        )
    return ok(f"{len(wanted)} packages are of the versions that vlmtune needs")


def bfloat16(patient: Patient) -> Finding:
    dtype = str(compute_dtype(patient.recipe.model)).removeprefix("torch.")
    if dtype == "bfloat16" and not patient.machine.bf16:
        return failure(
            "the run computes in bfloat16, and this card does not", "set `model.dtype: float16`, or use a card from Ampere on"
        )
    return ok(f"computed in {dtype}" + ("" if patient.machine.bf16 else "; the card has no bfloat16"))


def memory(patient: Patient) -> Finding:
    """Weights only, and only where they lie here: `vlmtune.plan` simulates the step."""
    files = _weights(patient.recipe.model)
    if not files:
        return warning(
            f"not known: the weights of {patient.recipe.model.name} are neither in a directory nor whole in the hub's cache",
            "ask `python -m vlmtune.plan` what the run needs",
        )
    need = round(sum(file.stat().st_size for file in files) * WEIGHTS[patient.recipe.model.quantization])
    said = f"the weights take about {gib(need)}, and {gib(patient.machine.free_memory)} are free"
    if need > patient.machine.free_memory:
        return failure(said, "close what else uses the memory, quantise (`model.quantization: nf4`), or take a larger machine")
    return ok(said)


DATA: dict[str, Check] = {
    "images: processor and tower": tower_settings,
    "images: smaller than a patch": small_pictures,
    "images: dominating": dominating_pictures,
    "images: duplicates": duplicates,
    "images: in train and eval": held_out_pictures,
    "length: tokens": lengths,
}
ENVIRONMENT: dict[str, Check] = {
    "environment: versions": versions,
    "environment: bfloat16": bfloat16,
    "environment: memory": memory,
}


def chart(counts: Sequence[int]) -> str:
    """How many of the numbers lie in each of `BINS` equal parts from 0 to the largest: `▁▃█▅▁▁▁▁`."""
    heights = [0] * BINS
    for count in counts:
        heights[min(count * BINS // (max(counts) + 1), BINS - 1)] += 1
    return "".join(BARS[-(-height * (len(BARS) - 1) // max(heights))] for height in heights)


def _places(patient: Patient, rows: Rows) -> dict[str, str]:
    """Fingerprint of each picture → the first row that has it."""
    places: dict[str, str] = {}
    for position in patient.some(rows):
        for source in pictures(rows[position]):
            places.setdefault(patient.collator.album.fingerprint(original(source)), rows.name(position))
    return places


def _weights(section: ModelSection) -> list[Path]:
    """A checkpoint's files of weights, from its directory or the hub's cache; none where one of them is missing."""
    directory = Path(section.name).expanduser()
    if not directory.is_dir():
        try:
            found = try_to_load_from_cache(section.name, "config.json", revision=section.revision or "main")
        except ValueError:  # neither a directory nor a name that the hub could have
            return []
        if not isinstance(found, str):
            return []
        directory = Path(found).parent
    index, whole = directory / SAFE_WEIGHTS_INDEX_NAME, directory / SAFE_WEIGHTS_NAME
    names: set[str] = {whole.name}
    if index.exists() and not whole.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [directory / name for name in names]
    return files if all(file.exists() for file in files) else []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "0"  # not there


def _edge(value: Any) -> int | None:
    """A size that is a number, or a mapping with a height."""
    if value is None or isinstance(value, int):
        return value
    return value.get("height") if isinstance(value, Mapping) else getattr(value, "height", None)
