"""Rows: where they come from, which are trained on and which are held out, and what is wrong with them.

`load_data` opens a recipe's data as `Rows`, which make messages of a row when it is asked for: pictures are opened as late
as possible, and a row keeps its number in the user's file, so that every error can name it.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from vlmtune.album import Album
from vlmtune.console import bar
from vlmtune.errors import DatasetError
from vlmtune.images import Shrunk
from vlmtune.messages import format_messages
from vlmtune.reading import Row, read_rows
from vlmtune.recipe import DataSection

Sizes: TypeAlias = Mapping[int, tuple[int, int]]  # number of a picture in its row, from 0 → width, height
SHOWN = 5  # wrong rows that an error names


class Sample(dict[str, Any]):
    """`{"messages": [...], "name": "row 17 of train.jsonl"}`: a row, formatted."""


@dataclass(frozen=True)
class Rows:
    """Rows of one data set, as samples.

    Pictures are a path, URL, data URL, bytes or PIL image. Rows count from 1, as the lines of a file do.
    """

    content: Sequence[Row]  # as `reading.read_rows` gives them, or a list
    source: str
    root: Path  # relative paths of pictures start here
    template: Mapping[str, Any]  # keywords of format_messages
    indices: Sequence[int]
    shrunk: Mapping[int, Sizes] = field(default_factory=dict[int, Sizes])  # index → what its pictures are made smaller to

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample:
        return self._sample(position)

    def raw(self, position: int) -> Row:
        """The row as the user's data has it."""
        return self.content[self.indices[position]]

    def name(self, position: int) -> str:
        return f"row {self.indices[position] + 1} of {self.source}"

    def select(self, positions: Iterable[int]) -> Rows:
        """Some of these rows, under their old numbers."""
        return replace(self, indices=array("q", (self.indices[position] for position in positions)))

    def shrink(self, sizes: Mapping[int, Sizes]) -> Rows:
        """These rows, with smaller pictures in those at the positions given."""
        return replace(self, shrunk={**self.shrunk, **{self.indices[position]: size for position, size in sizes.items()}})

    def alone(self, row: Row) -> Rows:
        """One more row, read as these are."""
        return replace(self, content=[row], indices=[0], source="the given rows", shrunk={})

    def prompt(self, position: int) -> Sample:
        """The sample without its last answer: what the model is asked."""
        return self._sample(position, prompt_only=True)

    def answered(self, position: int) -> Sample:
        """The sample, with its last answer where the row has one."""
        try:
            return self[position]
        except DatasetError:
            return self.prompt(position)

    def _sample(self, position: int, *, prompt_only: bool = False) -> Sample:
        name = self.name(position)
        try:
            messages = format_messages(self.raw(position), **self.template, prompt_only=prompt_only)
        except DatasetError as error:
            raise DatasetError(f"{name}: {error}") from None
        messages = [_rooted(message, self.root) for message in messages]
        return Sample(messages=resized(messages, self.shrunk.get(self.indices[position], {})), name=name)


def resized(messages: Sequence[Mapping[str, Any]], sizes: Sizes) -> list[dict[str, Any]]:
    """The messages with some of their pictures made smaller; nothing is opened."""
    numbers = itertools.count()

    def part_of(part: Mapping[str, Any]) -> dict[str, Any]:
        size = sizes.get(next(numbers)) if part["type"] == "image" else None
        return {**part, "image": Shrunk(part["image"], *size)} if size else dict(part)

    return [{**message, "content": [part_of(part) for part in message["content"]]} for message in messages]


def spread(rows: Rows | Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the rows, from the first to the last: data are often sorted."""
    count = min(count, len(rows))
    return [rows[position * len(rows) // count] for position in range(count)]


@dataclass(frozen=True)
class Split:
    """The rows of a run: read = trained on + held out + dropped, always."""

    train: Rows
    held_out: Rows | None
    dropped: Mapping[str, str] = field(default_factory=dict[str, str])  # name of a row → why
    shrunk: Mapping[str, str] = field(default_factory=dict[str, str])  # name of a row that is kept → what was made smaller

    def without(self, find_bad: Callable[[Rows], Mapping[int, str]], *, policy: str, hint: str) -> Split:
        """The split without the rows that `find_bad` finds, position → what is wrong; these are counted as dropped.

        Raises:
            DatasetError: there are bad rows and `policy` is not `drop`, or no others are left; the first few are named.

        """
        dropped = dict(self.dropped)

        def good(rows: Rows) -> Rows:
            bad = find_bad(rows)
            dropped.update({rows.name(position): reason for position, reason in bad.items()})
            return _without(rows, bad, policy=policy, hint=hint)

        train = good(self.train)
        return replace(self, train=train, held_out=good(self.held_out) if self.held_out is not None else None, dropped=dropped)


def load_data(section: DataSection, *, seed: int = 42) -> Split:
    """The rows to train on and the rows held out for evaluation, if any.

    Args:
        section: where the data lies and how a row is written down.
        seed: decides which rows `eval_fraction` and `eval_rows` hold out.

    Raises:
        DatasetError: the source cannot be read, or holds too few rows.

    """
    rows = _open(section, section.source, section.split)
    if section.max_rows is not None:
        rows = rows.select(range(min(section.max_rows, len(rows))))
    if section.eval_source is not None or section.eval_split is not None:
        held_out = _open(section, section.eval_source or section.source, section.eval_split or "train")
        if held_out.source == rows.source:  # the same name in another folder or split
            held_out = replace(held_out, source=f"{held_out.source} (held out)")
        return Split(rows, held_out)
    count = section.eval_rows or round(len(rows) * (section.eval_fraction or 0))
    if section.eval_fraction is not None:
        count = max(count, 1)
    if count >= len(rows):
        raise DatasetError(f"{rows.source} has {len(rows)} rows; {count} held out for evaluation leave none to train on")
    if count == 0:
        return Split(rows, None)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    kept = rows.select(position for position in range(len(rows)) if position not in chosen)
    return Split(kept, rows.select(sorted(chosen)))


def find_bad_rows(rows: Rows, *, check_images: bool = True, album: Album | None = None) -> dict[int, str]:
    """Position → what is wrong, for every row that makes no messages or, with `check_images`, whose picture does not decode.

    What is learnt of the pictures on the way comes into the album.
    """
    bad: dict[int, str] = {}
    places: deque[int] = deque()  # of the rows whose pictures are being looked at

    def pictures() -> Iterator[Any]:
        for position in bar(range(len(rows)), "Checking rows"):
            try:
                messages = rows[position]["messages"]
            except DatasetError as error:
                bad[position] = str(error).removeprefix(f"{rows.name(position)}: ")
                continue
            for part in (part for message in messages for part in message["content"]):
                if check_images and part["type"] == "image":
                    places.append(position)
                    yield part["image"]

    for fault in (album or Album()).faults(pictures()):
        position = places.popleft()
        if fault is not None:
            bad.setdefault(position, str(fault))
    return dict(sorted(bad.items()))


def _open(section: DataSection, source: str, split: str) -> Rows:
    content = read_rows(source, split)
    path = Path(source).expanduser()
    template = {name: getattr(section, name) for name in ("format", "system", "prompt", "response", "images")}
    root = path if path.is_dir() else path.parent if path.is_file() else Path()
    name = path.name if path.exists() else f"{source}, split {split}"
    return Rows(content, name, root, template, range(len(content)))


def _rooted(message: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The message with relative paths of pictures and videos made absolute."""

    def rooted(part: Mapping[str, Any]) -> dict[str, Any]:
        value = part.get(part["type"])
        if part["type"] == "text" or not isinstance(value, str) or ":" in value[:8]:  # http:, https:, data:, file:
            return dict(part)
        return {**part, part["type"]: str(root / value)}

    return {**message, "content": [rooted(part) for part in message["content"]]}


def _without(rows: Rows, bad: Mapping[int, str], *, policy: str, hint: str) -> Rows:
    if not bad:
        return rows
    kept = rows.select(position for position in range(len(rows)) if position not in bad)
    hint = hint if kept.indices else "no others are left"
    if policy != "drop" or not kept.indices:
        named = "".join(f"\n  {rows.name(position)}: {bad[position]}" for position in list(bad)[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DatasetError(f"{len(bad)} of {len(rows)} rows cannot be used ({hint}):{named}{more}")
    return kept
