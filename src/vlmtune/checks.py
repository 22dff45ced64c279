"""What a check is: a small function that looks at a patient and says what it found, in which row, and the remedy.

    Check = Callable[[Patient], Finding | list[Finding]]

A check reads and changes nothing. `checks_template` and `checks_data` hold those that need no weights, `model_checks` the
others; `doctor` puts them together.
"""

from __future__ import annotations

import copy
import importlib.metadata
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import psutil
import torch
from jinja2 import TemplateError
from peft import PeftModel
from PIL import Image
from torch import Tensor

from vlmtune.album import Album
from vlmtune.batch import IGNORE
from vlmtune.collator import MultimodalCollator, pictures
from vlmtune.data import Rows, Split, spread
from vlmtune.errors import ModelError, VlmtuneError, one_line
from vlmtune.model import device
from vlmtune.output import existing
from vlmtune.proof import CANNOT
from vlmtune.recipe import Recipe

T = TypeVar("T")
Row = Mapping[str, Any]
Message = Mapping[str, Any]
Verdict = Literal["ok", "warning", "failure"]
NAMED = 3  # rows, modules or pictures that a finding names


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    check: str  # "images: duplicates"
    verdict: Verdict
    found: str
    remedy: str = ""


def ok(found: str) -> Finding:
    return Finding("", "ok", found)


def warning(found: str, remedy: str) -> Finding:
    return Finding("", "warning", found, remedy)


def failure(found: str, remedy: str) -> Finding:
    return Finding("", "failure", found, remedy)


@dataclass(frozen=True)
class Machine:
    """What a run finds here."""

    requires: Sequence[str] = ()  # "torch>=2.8", as in pyproject
    bf16: bool = True  # whether the device computes in it
    free_memory: int = 2**62  # bytes, where the model goes
    free_disk: int = 2**62  # bytes, where the run is written


def this_machine(recipe: Recipe) -> Machine:
    there = device(use_cpu=bool(recipe.train.get("use_cpu")))
    on_gpu = there.type == "cuda"
    return Machine(
        requires=importlib.metadata.requires("vlmtune") or [],
        bf16=not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False),
        free_memory=torch.cuda.mem_get_info(there)[0] if on_gpu else psutil.virtual_memory().available,
        free_disk=shutil.disk_usage(existing(recipe.output_dir)).free,
    )


@dataclass(frozen=True)
class Encoded:
    """A row as the model gets it, without padding."""

    name: str
    row: Row
    ids: Tensor  # [seq]
    labels: Tensor  # [seq]

    @property
    def trained(self) -> Tensor:
        """`[seq]`, true where the loss is taken."""
        return self.labels != IGNORE

    @property
    def answers(self) -> int:
        return sum(message["role"] == "assistant" for message in self.row["messages"])

    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each run of trained tokens."""
        edges = torch.nn.functional.pad(self.trained.int(), (1, 1)).diff().nonzero().flatten().tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass
class Patient:
    """A run that is looked at before it begins.

    Args:
        recipe: what is to be run.
        collator: makes the batches; `collate`, where the user brings one of their own.
        config: the checkpoint's.
        split: all rows of the run.
        rows: those of them that are looked at one by one.
        lengths: name of a row → its tokens, those included that are too long.
        load: brings the model with its adapter, when a check first asks for it.
        few: rows whose loss is taken.
        most: rows of which pictures are compared.
        checkpoints: that lie on the disk at once.

    """

    recipe: Recipe
    collator: MultimodalCollator
    config: Any
    split: Split
    rows: Sequence[Row]
    load: Callable[[], PeftModel]
    lengths: Mapping[str, int] = field(default_factory=dict[str, int])
    collate: Callable[[Sequence[Row]], Mapping[str, Any]] | None = None
    machine: Machine = field(default_factory=Machine)
    few: int = 4
    most: int = 10**9
    checkpoints: int = 0
    losses: dict[str, float] = field(default_factory=dict[str, float], init=False, repr=False)  # name of a row → as it is

    @property
    def model(self) -> PeftModel:
        return _given(self._model)

    @cached_property
    def _model(self) -> PeftModel | Exception:
        return _outcome(self.load)

    @property
    def tokenizer(self) -> Any:
        return self.collator.tokenizer

    @property
    def takes_images(self) -> bool:
        return self.collator.family.takes_images

    @cached_property
    def seeing_rows(self) -> list[Row]:
        """The rows with pictures, those of the fewest tokens first."""
        return [each.row for each in sorted(self.encoded, key=lambda each: len(each.ids)) if pictures(each.row)]

    @cached_property
    def unlimited(self) -> MultimodalCollator:
        """The collator, taking rows of any length."""
        collator = copy.copy(self.collator)
        collator.max_length = None
        return collator

    def batch(self, rows: Sequence[Row]) -> Mapping[str, Any]:
        """The rows as they go into training, but for packing."""
        return (self.collate or self.unlimited)(rows)

    @property
    def encoded(self) -> list[Encoded]:
        """The rows looked at, each by itself."""
        return _given(self._encoded)

    @cached_property
    def _encoded(self) -> list[Encoded] | Exception:
        return _outcome(self._encode)

    def _encode(self) -> list[Encoded]:
        found: list[Encoded] = []
        for row in self.rows:
            batch = self.batch([row])
            keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[0].bool()
            found.append(Encoded(str(row["name"]), row, batch["input_ids"][0][keep], batch["labels"][0][keep]))
        return found

    @cached_property
    def stop(self) -> int:
        """The token that ends an answer; where there is none, the rows say so first, by their names."""
        _ = self.encoded
        return self.collator.stop_token_id

    def prompt(self, row: Row, turns: int) -> Tensor:
        """`[seq]`, what a model is asked by the first turns of a row; its pictures are blank and of the right size."""
        asked = {**row, "messages": row["messages"][:turns]}
        return self._blind.prompts([asked])["input_ids"][0]

    def rendered(self, messages: Sequence[Message], template: str | None = None) -> str:
        """The text that a chat template, the training template unless given, makes of messages.

        Raises:
            ModelError: it refuses them.

        """
        shaped = [{**message, "content": [_bare(part) for part in message["content"]]} for message in messages]
        if template is None:
            shaped = self.collator.as_written(shaped)
        if self.tokenizer is self.collator.processor:  # a language model's template takes plain texts
            shaped = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in shaped]
        tools = next((message["tools"] for message in messages if message.get("tools")), None)
        try:
            return self.collator.processor.apply_chat_template(
                shaped, tokenize=False, chat_template=template or self.collator.chat_template, tools=tools
            )
        except (TemplateError, *CANNOT) as error:
            raise ModelError(f"the chat template refuses it: {one_line(error)}") from error

    @cached_property
    def _blind(self) -> MultimodalCollator:
        collator = copy.copy(self.unlimited)
        collator.album = _Blank(self.collator.album)
        return collator

    def some(self, rows: Rows) -> list[int]:
        """Positions of the rows whose pictures are compared."""
        return spread(range(len(rows)), self.most)


class _Blank(Album):
    """Opens a blank picture of each one's size."""

    def __init__(self, album: Album) -> None:
        super().__init__()
        self._album = album

    def open(self, source: Any) -> Image.Image:
        return Image.new("RGB", self._album.size(source))

    def size(self, source: Any) -> tuple[int, int]:
        return self._album.size(source)


Check: TypeAlias = Callable[[Patient], Finding | list[Finding]]


def look(checks: Mapping[str, Check], patient: Patient) -> list[Finding]:
    """What the checks find. One that cannot be made is a warning: it says nothing about the run."""
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            found = check(patient)
        except VlmtuneError as error:
            found = failure(str(error), "mend what the sentence names")
        except torch.OutOfMemoryError:
            found = warning("could not be tried: memory is full", "ask `python -m vlmtune.plan` what the run needs")
        except CANNOT as error:
            found = warning(f"could not be tried: {one_line(error)}", "see whether training stops at the same place")
        findings += [replace(each, check=name) for each in (found if isinstance(found, list) else [found])]
    return findings


def named(names: Sequence[str]) -> str:
    """`row 1 of a.jsonl, row 2 of a.jsonl, row 7 of a.jsonl and 12 more`."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _outcome(make: Callable[[], T]) -> T | Exception:
    """What is made, or why not: many checks ask, and it is tried once."""
    try:
        return make()
    except (VlmtuneError, *CANNOT) as error:
        return error


def _given(outcome: T | Exception) -> T:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _bare(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part without its picture, which a template does not look at."""
    return dict(part) if part["type"] == "text" else {"type": part["type"]}
