"""Rows as they lie in a user's file, directory or hub data set."""

from __future__ import annotations

import csv
import json
from array import array
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, overload

import datasets

from vlmtune.errors import DatasetError

Row = Mapping[str, Any]
READERS = {".parquet": "parquet", ".arrow": "arrow"}  # of datasets.load_dataset
SEPARATORS = {".csv": ",", ".tsv": "\t"}
KNOWN = ".jsonl, .json, .parquet, .csv, .tsv, .arrow"
LONGEST_CELL = 2**31 - 1  # characters: a picture in a data URL is more than the csv module's own limit
NO_SPLIT = "hold rows out with data.eval_source, data.eval_fraction or data.eval_rows"


class TextRows(Sequence[Row]):
    """Rows as the JSON that they were, read again whenever one is asked for.

    They lie in a temporary file that goes with the process and is mapped: where its directory is on a disk, memory that the
    system may take back at any time. Pickled, they are in memory.

    Raises:
        DatasetError: there is no room for the file.

    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._ends = array("q", [0])
        self._text: bytes | mmap = b""
        try:
            with TemporaryFile() as file:
                for line in lines:
                    self._ends.append(self._ends[-1] + file.write(line.encode("utf-8", "surrogatepass")))
                file.flush()
                if self._ends[-1]:  # an empty file has no map
                    self._text = mmap(file.fileno(), 0, access=ACCESS_READ)
        except OSError as error:
            raise DatasetError(
                f"the rows cannot be laid into a temporary file: {error.strerror}. TMPDIR names a directory with room for them"
            ) from error

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        number = range(len(self))[number]
        return json.loads(self._line(number))

    def __getstate__(self) -> dict[str, Any]:
        return {"_ends": self._ends, "_text": self._text[:]}

    def _line(self, number: int) -> str:
        return self._text[self._ends[number] : self._ends[number + 1]].decode("utf-8", "surrogatepass")


def read_rows(source: str, split: str) -> Sequence[Row]:
    """The rows of a source; their pictures stay what they are.

    Raises:
        DatasetError: it cannot be read, or holds no rows.

    """
    path = Path(source).expanduser()
    if path.suffix in {".json", ".jsonl"} or (path.is_file() and path.suffix in SEPARATORS):
        content = _read_table(path) if path.suffix in SEPARATORS else _read_json(path)
        if split != "train":
            raise DatasetError(f"data source {path} is one file and has no split {split!r}: {NO_SPLIT}")
    elif path.is_file() and path.suffix not in READERS:
        raise DatasetError(f"data source {path} is a {path.suffix or 'file without suffix'}; files of {KNOWN} can be read")
    else:
        content = _read_dataset(path, source, split)
    if len(content) == 0:
        raise DatasetError(f"data source {source} holds no rows")
    return content


def _text(path: Path) -> str:
    """The file's text, its line ends as they are."""
    with _readable(path):
        return path.read_bytes().decode("utf-8-sig")


def _lines(path: Path, newline: str) -> Iterator[str]:
    """The file's text line by line, their ends as they are; `newline` says where one ends, as `open` has it."""
    with _readable(path):
        try:
            with path.open(encoding="utf-8-sig", newline=newline) as file:
                yield from file
        except UnicodeDecodeError:
            _text(path)  # tells the byte's place in the file, and not in a block of it
            raise


@contextmanager
def _readable(path: Path) -> Generator[None]:
    """Turns what is wrong with a file into one sentence."""
    try:
        if path.is_fifo():  # would wait for a writer
            raise DatasetError(f"data source {path} is a pipe, wanted a file")
        yield
    except OSError as error:
        raise DatasetError(f"data source {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"data source {path} is not UTF-8: {error.reason} at byte {error.start}") from None


def _read_table(path: Path) -> TextRows:
    """Rows of a .csv or .tsv file: each cell is the text that it is, an empty one is null."""
    cells = _cells(path)
    header = next(cells)
    return TextRows(_dump({name: cell or None for name, cell in zip(header, row, strict=True)}) for row in cells)


def _cells(path: Path) -> Iterator[list[str]]:
    """The header, and then the cells of each row.

    Pandas would make 7 of `007`, null of `NA`, and shift the cells of rows that are longer than the header.
    """
    limit = csv.field_size_limit(LONGEST_CELL)
    lines = csv.reader(_lines(path, ""), delimiter=SEPARATORS[path.suffix], strict=True)
    try:
        filled = (cells for cells in lines if cells)
        header = next(filled, [])
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise DatasetError(f"data source {path} has {header.count(twice[0])} columns of the name {twice[0]!r}")
        yield header
        for number, cells in enumerate(filled, 1):
            if len(cells) != len(header):
                raise DatasetError(
                    f"row {number} of {path} has {len(cells)} cells, wanted {len(header)} as in the header: a cell that holds "
                    "a separator or a line's end stands in quotes"
                )
            yield cells
    except csv.Error as error:
        raise DatasetError(f"line {lines.line_num} of {path} cannot be read: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _read_json(path: Path) -> TextRows:
    """Rows of a .jsonl or .json file, as Python has them: Arrow would refuse columns whose rows differ in type."""
    return TextRows(map(_dump, _json_array(path, _text(path))) if path.suffix == ".json" else _json_lines(path))


def _json_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path, "\n"), 1):
        if line.strip():
            _json(line.removesuffix("\n"), f"line {number} of {path}")
            yield line


def _dump(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False)


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


def _json_array(path: Path, text: str) -> list[Any]:
    content = _json(text, str(path))
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DatasetError(f"{path} holds a {type(content).__name__}; a list of rows is wanted")
    return content


def _read_dataset(path: Path, source: str, split: str) -> Sequence[Row]:
    for table in sorted(path.rglob("*")) if path.is_dir() else ():
        if table.suffix in SEPARATORS:
            deque(_cells(table), maxlen=0)  # refuses what pandas would shift
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
