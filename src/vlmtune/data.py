"""Rows: where they come from, which are trained on and which are held out, and what is wrong with them.

`load_data` opens a recipe's data as `Rows`, which make messages of a row when it is asked for: pictures are opened as late
as possible, and a row keeps its number in the user's file, so that every error can name it.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from vlmtune.console import bar
from vlmtune.errors import DatasetError
from vlmtune.images import Shrunk, load_image
from vlmtune.messages import format_messages
from vlmtune.recipe import DataSection

Row = Mapping[str, Any]
Sizes: TypeAlias = Mapping[int, tuple[int, int]]  # number of a picture in its row, from 0 → width, height
READERS = {".parquet": "parquet", ".arrow": "arrow"}  # of datasets.load_dataset
SEPARATORS = {".csv": ",", ".tsv": "\t"}
KNOWN = ".jsonl, .json, .parquet, .csv, .tsv, .arrow"
LONGEST_CELL = 2**31 - 1  # characters: a picture in a data URL is more than the csv module's own limit
NO_SPLIT = "hold rows out with data.eval_source, data.eval_fraction or data.eval_rows"
SHOWN = 5  # wrong rows that an error names


class Sample(dict[str, Any]):
    """`{"messages": [...], "name": "row 17 of train.jsonl"}`: a row, formatted."""


@dataclass(frozen=True)
class Rows:
    """Rows of one data set, as samples.

    Pictures are a path, URL, data URL, bytes or PIL image. Rows count from 1, as the lines of a file do.
    """

    content: Sequence[Row]  # a list, or a datasets.Dataset
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
        return replace(self, indices=[self.indices[position] for position in positions])

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


def find_bad_rows(rows: Rows, *, check_images: bool = True) -> dict[int, str]:
    """Position → what is wrong, for every row that makes no messages or, with `check_images`, whose picture does not decode."""
    bad: dict[int, str] = {}
    for position in bar(range(len(rows)), "Checking rows"):
        try:
            sample = rows[position]
            pictures = [part["image"] for m in sample["messages"] for part in m["content"] if part["type"] == "image"]
            if check_images:
                for picture in pictures:
                    load_image(picture)
        except DatasetError as error:
            bad[position] = str(error).removeprefix(f"{rows.name(position)}: ")
    return bad


def _open(section: DataSection, source: str, split: str) -> Rows:
    path = Path(source).expanduser()
    template = {name: getattr(section, name) for name in ("format", "system", "prompt", "response", "images")}
    if path.suffix in {".json", ".jsonl"} or (path.is_file() and path.suffix in SEPARATORS):
        content: Sequence[Row] = _read_table(path) if path.suffix in SEPARATORS else _read_json(path)
        if split != "train":
            raise DatasetError(f"data source {path} is one file and has no split {split!r}: {NO_SPLIT}")
    elif path.is_file() and path.suffix not in READERS:
        raise DatasetError(f"data source {path} is a {path.suffix or 'file without suffix'}; files of {KNOWN} can be read")
    else:
        content = _read_dataset(path, source, split)
    if len(content) == 0:
        raise DatasetError(f"data source {source} holds no rows")
    root = path if path.is_dir() else path.parent if path.is_file() else Path()
    name = path.name if path.exists() else f"{source}, split {split}"
    return Rows(content, name, root, template, range(len(content)))


def _text(path: Path) -> str:
    """The file's text, its line ends as they are."""
    try:
        if path.is_fifo():  # would wait for a writer
            raise DatasetError(f"data source {path} is a pipe, wanted a file")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"data source {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"data source {path} is not UTF-8: {error.reason} at byte {error.start}") from None


def _read_table(path: Path) -> list[Row]:
    """Rows of a .csv or .tsv file: each cell is the text that it is, an empty one is null.

    Pandas would make 7 of `007`, null of `NA`, and shift the cells of rows that are longer than the header.
    """
    limit = csv.field_size_limit(LONGEST_CELL)
    lines = csv.reader(io.StringIO(_text(path), newline=""), delimiter=SEPARATORS[path.suffix], strict=True)
    try:
        filled = [cells for cells in lines if cells]
    except csv.Error as error:
        raise DatasetError(f"line {lines.line_num} of {path} cannot be read: {error}") from None
    finally:
        csv.field_size_limit(limit)
    header, rows = (filled or [[]])[0], filled[1:]
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DatasetError(f"data source {path} has {header.count(twice[0])} columns of the name {twice[0]!r}")
    for number, cells in enumerate(rows, 1):
        if len(cells) != len(header):
            raise DatasetError(
                f"row {number} of {path} has {len(cells)} cells, wanted {len(header)} as in the header: a cell that holds "
                "a separator or a line's end stands in quotes"
            )
    return [{name: cell or None for name, cell in zip(header, cells, strict=True)} for cells in rows]


def _read_json(path: Path) -> list[Row]:
    """Rows of a .jsonl or .json file, as Python has them: Arrow would refuse columns whose rows differ in type."""
    text = _text(path)
    if path.suffix == ".json":
        return _json_array(path, text)
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_json(line, f"line {number} of {path}"))
    return rows


def _json(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # the last would stand for all
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise DatasetError(f"{where} has the key {twice!r} more than once in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text else f"line {error.lineno}, column {error.colno}"
        raise DatasetError(f"{where} is not JSON: {error.msg.removesuffix(' at')} at {place}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DatasetError(f"{where} cannot be read as JSON: {error}") from None


def _json_array(path: Path, text: str) -> list[Row]:
    content = _json(text, str(path))
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DatasetError(f"{path} holds a {type(content).__name__}; a list of rows is wanted")
    return content


def _read_dataset(path: Path, source: str, split: str) -> Sequence[Row]:
    for table in sorted(path.rglob("*")) if path.is_dir() else ():
        if table.suffix in SEPARATORS:
            _read_table(table)  # refuses what pandas would shift
    try:
        if path.is_file():
            dataset = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split=split)
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(str(path))
        else:
            dataset = datasets.load_dataset(source, split=split)
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[split]
        elif dataset.split is None and split != "train":  # saved without a name
            raise KeyError(split)
    except KeyError:
        raise DatasetError(f"data source {source} has no split {split!r}: {NO_SPLIT}") from None
    except Exception as error:  # datasets raises errors of a dozen kinds, and the messages are what matters
        reason = " ".join(str(error.__cause__ or error).split())
        if reason.startswith("Unknown split"):
            raise DatasetError(f"data source {source} has no split {split!r}: {NO_SPLIT}") from None
        if "corresponds to no data" in reason or "BatchSize must be greater than 0" in reason:  # a header, and no rows
            return []
        found = "cannot be read" if path.exists() else "is no file, no directory and no data set on the hub"
        raise DatasetError(f"data source {source} {found}: {reason}") from error
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return dataset  # pyright: ignore[reportReturnType]


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
