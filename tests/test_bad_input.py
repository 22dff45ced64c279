"""Bad input ends in one clear sentence that names the place and what would be right, and nothing is lost.

Every check is asked of the lowest layer that owns it. What single pictures, row formats and recipes can have wrong stands in
test_images, test_messages and test_recipe; test_corpus sends whole broken inputs through `finetune`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from pictures import headed, png
from tiny import KINDS, make_processor

from vlmtune import DatasetError, ModelError, MultimodalCollator, OutputError, RecipeError, VlmtuneError, finetune, load_recipe
from vlmtune.data import find_bad_rows, load_data
from vlmtune.merge import merge_adapter
from vlmtune.model import load_model
from vlmtune.output import claim, disk_errors, last_checkpoint
from vlmtune.recipe import DataSection

MakeRecipe = Callable[..., dict[str, Any]]
Checkpoint = Callable[[str], Path]
TEXTS = {"prompt": "Name it.", "response": "{name}", "images": "image"}


def said(kind: type[VlmtuneError], function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The sentence that the function ends with, which is of this kind and no other."""
    with pytest.raises(VlmtuneError) as caught:
        function(*args, **options)
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Sequence[Any]], Path]:
    """`write([{"name": "red"}, "broken"])`: a .jsonl file of these rows, texts as they are, beside `good.png`."""
    (tmp_path / "good.png").write_bytes(png())

    def write(rows: Sequence[Any]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
        return path

    return write


Write = Callable[[Sequence[Any]], Path]


def bad_rows(path: Path, **section: Any) -> dict[int, str]:
    """What is wrong with the rows of a file: row number → reason."""
    rows = load_data(DataSection(source=str(path), **({**TEXTS, **section}))).train
    return {position + 1: reason for position, reason in find_bad_rows(rows).items()}


# ---- a row


GOOD = {"image": "good.png", "name": "red"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "good.png"}, "format 'columns': column 'name' is missing; the row has image; braces that stay are doubled."),
        ({"name": "red"}, "format 'columns': column 'image' is missing; the row has name."),
        ({**GOOD, "name": ""}, "format 'columns': the answer is empty: column 'name' is blank."),
        ({**GOOD, "name": "  \n"}, "format 'columns': the answer is empty: column 'name' is blank."),
        ({**GOOD, "name": None}, "format 'columns': the answer is empty: column 'name' is null."),
        ('{"image": "good.png", "name": NaN}', "format 'columns': the answer is empty: column 'name' is null."),
        (
            {**GOOD, "name": ["red"]},
            "format 'columns': column 'name' holds a value of type list, wanted text or a number for the template.",
        ),
        (
            '{"name": "\\ud800"}',
            "format 'columns': column 'image' is missing; the row has name.",
        ),
        (
            '{"image": null, "name": "\\ud800"}',
            "format 'columns': the text of turn 2 holds half of a UTF-16 pair, which is no character.",
        ),
        ("[1, 2]", "a row is a mapping of columns to values, found a value of type list."),
        ("5", "a row is a mapping of columns to values, found a value of type int."),
        ("null", "a row is a mapping of columns to values, found null."),
        (
            {**GOOD, "image": 5},
            "format 'columns': column 'image' holds a value of type int, wanted a PIL image, path, URL, data URL or bytes.",
        ),
        (
            {**GOOD, "image": {"file": "good.png"}},
            "format 'columns': column 'image' holds a mapping without a picture, "
            "wanted one of bytes, image, image_url, url, path, base64 in it.",
        ),
    ],
)
def test_a_row_that_makes_no_messages_is_named_with_what_was_found_and_wanted(write: Write, row: Any, reason: str) -> None:
    assert bad_rows(write([GOOD, row, GOOD])) == {2: reason}


@pytest.mark.parametrize("value", [5, 2.5, True, "5", "日本語 🪁", "a\u2028b"])
def test_numbers_and_any_text_are_good_answers(write: Write, value: Any) -> None:
    assert bad_rows(write([{**GOOD, "name": value}])) == {}


@pytest.mark.parametrize("value", [None, "", [], [[]], {}, {"bytes": None, "path": None}])
def test_a_row_may_have_no_picture_where_others_have_one(write: Write, value: Any) -> None:
    path = write([GOOD, {**GOOD, "image": value}])
    rows = load_data(DataSection(source=str(path), **TEXTS)).train
    assert bad_rows(path) == {}
    assert [len(rows[position]["messages"][0]["content"]) for position in (0, 1)] == [2, 1]


def turns(*pairs: tuple[str, Any], image: Any = None) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    return {"image": image, "conversations": [{"from": names.get(role, role), "value": text} for role, text in pairs]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (turns(("user", "hi")), "the last turn is the user's, wanted the assistant's: it is what is learnt."),
        (turns(("user", "hi"), ("assistant", " ")), "the answer is empty in turn 2."),
        (turns(("user", "hi"), ("user", "hi"), ("assistant", "a")), "turn 2 is the user's, wanted the assistant's."),
        (turns(), "there is no user's turn, wanted a user's and an assistant's."),
        (
            turns(("user", "hi"), ("tool", "a")),
            "turn 2 is the tool's, wanted the assistant's (a tool's result follows upon tool_calls).",
        ),
        (
            turns(("user", "<image>a"), ("assistant", "b"), image=["good.png", "good.png"]),
            "1 <image> placeholders, 2 pictures, wanted one for each.",
        ),
        (
            turns(("user", "<image><image>a"), ("assistant", "b"), image="good.png"),
            "2 <image> placeholders, 1 pictures, wanted one for each.",
        ),
        (turns(("user", "<image>a"), ("assistant", "b")), "1 <image> placeholders, 0 pictures, wanted one for each."),
        ({"conversations": "hi"}, "column 'conversations' holds a value of type str, wanted a list of turns."),
        (
            {"conversations": [[{"from": "human", "value": "hi"}]]},
            "turn 1 is a value of type list, wanted a mapping with a role and a content.",
        ),
    ],
)
def test_turns_in_the_wrong_order_or_number_are_named(write: Write, row: Any, reason: str) -> None:
    good = turns(("user", "<image>a"), ("assistant", "b"), image="good.png")
    found = bad_rows(write([good, row]), prompt=None, response=None, images=None)
    assert found == {2: f"format 'sharegpt': {reason}"}


# ---- a picture


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty (zero bytes)."),
        (b"hello", "is not a picture in a format that Pillow reads."),
        (png()[:60], "is truncated or damaged: "),
        (png("RGB", (300, 300), "JPEG")[:900], "is truncated or damaged: "),
        (
            headed(60_000, 60_000),
            "has 3,600,000,000 pixels, the limit is 89,478,485 (PIL.Image.MAX_IMAGE_PIXELS): it may be a decompression bomb.",
        ),
        (headed(10_000, 9_000), "has 90,000,000 pixels, the limit is 89,478,485 (PIL.Image.MAX_IMAGE_PIXELS)"),
    ],
    ids=["zero bytes", "text", "half a png", "half a jpeg", "bomb", "small bomb"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_cannot_be_read_is_named_with_its_row_and_file(
    write: Write, tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    ((row, found),) = bad_rows(write([GOOD, {**GOOD, "image": "bad.png"}])).items()
    assert row == 2
    assert found.startswith(f"picture '{tmp_path}/bad.png' {reason}")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("none.png", "picture '{root}/none.png' is not there: no file '{root}/none.png'."),
        ("folder", "picture '{root}/folder' is a directory, wanted a file."),
        ("loop.png", "picture '{root}/loop.png' cannot be opened: Too many levels of symbolic links."),
        ("a\0b.png", "picture '{root}/a\\x00b.png' cannot be opened: embedded null byte."),
        ("/dev/null", "picture '/dev/null' is empty (zero bytes)."),
        (
            "http://127.0.0.1:9/a.png",
            "picture 'http://127.0.0.1:9/a.png' cannot be downloaded: "
            "<urlopen error [Errno 111] Connection refused>. Offline, use files.",
        ),
        ("data:image/png;base64,@@", "picture in a data URL of 24 characters is empty (zero bytes)."),
    ],
)
def test_a_picture_that_is_not_there_is_named(write: Write, tmp_path: Path, image: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert bad_rows(write([GOOD, {**GOOD, "image": image}])) == {2: reason.replace("{root}", str(tmp_path))}


def test_file_names_may_hold_any_character(write: Write, tmp_path: Path) -> None:
    (tmp_path / "bïld 写真 #1%20.png").write_bytes(png())
    assert bad_rows(write([{**GOOD, "image": "bïld 写真 #1%20.png"}])) == {}


STRANGE = {
    "cmyk": png("CMYK", file_format="TIFF"),
    "rgba": png("RGBA"),
    "palette": png("P"),
    "grey": png("L"),
    "black and white": png("1"),
    "16 bit": png("I;16"),
    "1×1": png(size=(1, 1)),
    "10000×3": png(size=(10_000, 3)),
    "3×10000": png(size=(3, 10_000)),
}
REFUSED = {  # by the family's own processor; all other strange pictures train
    ("qwen2_vl", "10000×3"): "absolute aspect ratio must be smaller than 200, got 3333.3",
    ("qwen2_vl", "3×10000"): "absolute aspect ratio must be smaller than 200, got 3333.3",
    ("pixtral", "10000×3"): "Size must contain 'height' and 'width' keys",  # it makes them 0 pixels high
    ("pixtral", "3×10000"): "Size must contain 'height' and 'width' keys",
}


@pytest.fixture(scope="module", params=KINDS)
def model_of_a_family(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> tuple[str, Any, MultimodalCollator]:
    recipe = load_recipe(
        {
            "model": {"name": str(checkpoint(request.param)), "quantization": "none", "dtype": "float32"},
            "data": {"source": "none"},
        }
    )
    model, processor, family = load_model(recipe)
    return request.param, model, MultimodalCollator(processor, family)


@pytest.mark.parametrize("picture", STRANGE)
def test_a_strange_picture_trains_or_its_row_is_named(
    model_of_a_family: tuple[str, Any, MultimodalCollator], picture: str
) -> None:
    kind, model, collator = model_of_a_family
    rows = [sample(png(), "row 1 of t.jsonl"), sample(STRANGE[picture], "row 2 of t.jsonl")]
    reason = REFUSED.get((kind, picture))
    if reason is None:
        loss = model(**collator(rows)).loss
        loss.backward()
        assert 0 < loss.item() < 20
    else:
        told = said(DatasetError, collator, rows)
        where = f"row 2 of t.jsonl: the model's processor refuses it (its pictures have {picture} pixels): "
        assert told.startswith(where + reason)


def sample(picture: Any, name: str, answer: str = "Red.") -> dict[str, Any]:
    parts = [{"type": "image", "image": picture}] if picture else []
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "Which colour?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "name": name,
    }


@pytest.mark.parametrize(("kind", "part"), [("image", "picture"), ("video", "video")])
def test_a_text_model_given_pictures_says_so(kind: str, part: str) -> None:
    collator = MultimodalCollator(make_processor("text"))
    row = sample(None, "row 2 of t.jsonl")
    row["messages"][0]["content"].append({"type": kind, kind: png()})
    assert said(DatasetError, collator, [row]) == f"row 2 of t.jsonl has a {part}, and text models take none"


# ---- a source


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"name": "a"}\n\n{"name": \n', "line 3 of {path} is not JSON: Expecting value at column 10"),
        ("a.jsonl", '{"name": "a\tb"}', "line 1 of {path} is not JSON: Invalid control character at column 12"),
        ("a.jsonl", "[" * 100_000, "line 1 of {path} cannot be read as JSON: maximum recursion depth exceeded"),
        ("a.jsonl", "", "data source {path} holds no rows"),
        ("a.jsonl", " \n\n", "data source {path} holds no rows"),
        ("a.jsonl", b'{"name": "\xe4"}', "data source {path} is not UTF-8: invalid continuation byte at byte 10"),
        ("a.json", '[{"name": "a"},\n]', "{path} is not JSON: Expecting value at line 2, column 1"),
        ("a.json", '{"name": "a"}', "{path} holds a dict; a list of rows is wanted"),
        ("a.json", "[]", "data source {path} holds no rows"),
        ("a.csv", "", "data source {path} holds no rows"),
        ("a.csv", "name,image\n", "data source {path} holds no rows"),
        ("a.parquet", "", "data source {path} cannot be read: Parquet file size is 0 bytes"),
        ("a.parquet", "PAR1 and then nothing", "data source {path} cannot be read: Parquet magic bytes not found in footer."),
        ("a.xlsx", "PK", "data source {path} is a .xlsx; files of .jsonl, .json, .parquet, .csv, .tsv, .arrow can be read"),
        ("a", "PK", "data source {path} is a file without suffix; files of .jsonl, .json"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert said(DatasetError, bad_rows, path).startswith(sentence.replace("{path}", str(path)))


def test_a_parquet_file_without_rows_holds_no_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"name": []}).to_parquet(tmp_path / "a.parquet")
    assert said(DatasetError, bad_rows, tmp_path / "a.parquet") == f"data source {tmp_path}/a.parquet holds no rows"


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"name": "a"}\r\n{"name": "b"}\r\n')
    assert bad_rows(tmp_path / "a.jsonl", images=[]) == {}


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_cells_that_a_table_leaves_empty_are_null(tmp_path: Path, suffix: str, separator: str) -> None:
    (tmp_path / "good.png").write_bytes(png())
    lines = [("name", "image"), ("red", "good.png"), ("", "good.png"), ("blue", "")]
    (tmp_path / f"a.{suffix}").write_text("".join(separator.join(line) + "\n" for line in lines))
    found = bad_rows(tmp_path / f"a.{suffix}")
    assert found == {2: "format 'columns': the answer is empty: column 'name' is null."}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nowhere.jsonl", "data source nowhere.jsonl cannot be read: No such file or directory"),
        ("nowhere.csv", "data source nowhere.csv is no file, no directory and no data set on the hub: "),
        ("/no/such/folder", "data source /no/such/folder is no file, no directory and no data set on the hub: "),
        ("somebody/something", "data source somebody/something is no file, no directory and no data set on the hub: "),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, sentence: str) -> None:
    assert said(DatasetError, load_data, DataSection(source=source)).startswith(sentence)


def test_an_empty_folder_holds_no_data(tmp_path: Path) -> None:
    told = said(DatasetError, load_data, DataSection(source=str(tmp_path)))
    assert told.startswith(f"data source {tmp_path} cannot be read: The directory at {tmp_path} doesn't contain any data files")


def a_json_file(folder: Path) -> Path:
    (folder / "a.jsonl").write_text('{"name": "a"}\n{"name": "b"}\n')
    return folder / "a.jsonl"


def a_table(folder: Path) -> Path:
    (folder / "a.csv").write_text("name\na\nb\n")
    return folder / "a.csv"


def a_saved_dataset(folder: Path) -> Path:
    datasets.Dataset.from_dict({"name": ["a", "b"]}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def a_saved_dict(folder: Path) -> Path:
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"name": ["a", "b"]})).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("source", [a_json_file, a_table, a_saved_dataset, a_saved_dict])
def test_an_evaluation_split_that_does_not_exist_is_refused_and_not_replaced_by_the_training_rows(
    tmp_path: Path, source: Callable[[Path], Path]
) -> None:
    path = source(tmp_path)
    told = said(DatasetError, load_data, DataSection(source=str(path), eval_split="validation"))
    assert told.startswith(f"data source {path} ")
    assert told.endswith("no split 'validation': hold rows out with data.eval_source, data.eval_fraction or data.eval_rows")


def test_the_smallest_fraction_holds_one_row_out(tmp_path: Path) -> None:
    split = load_data(DataSection(source=str(a_json_file(tmp_path)), eval_fraction=1e-9))
    assert (len(split.train), len(split.held_out or [])) == (1, 1)


@pytest.mark.parametrize("section", [{"eval_rows": 2}, {"eval_rows": 5}, {"eval_fraction": 0.9}])
def test_an_evaluation_that_leaves_no_row_to_train_on_is_refused(tmp_path: Path, section: Mapping[str, Any]) -> None:
    told = said(DatasetError, load_data, DataSection(source=str(a_json_file(tmp_path)), **section))
    assert told.startswith("a.jsonl has 2 rows; ")
    assert told.endswith("held out for evaluation leave none to train on")


# ---- bad rows, raised or dropped


def test_the_first_bad_rows_are_listed_with_their_numbers_and_how_to_go_on(write: Write) -> None:
    split = load_data(DataSection(source=str(write([GOOD, *[{**GOOD, "name": ""}] * 7])), **TEXTS))
    told = said(DatasetError, split.without, find_bad_rows, policy="raise", hint="set `on_bad_row: drop`")
    reason = "format 'columns': the answer is empty: column 'name' is blank."
    assert told.splitlines() == [
        "7 of 8 rows cannot be used (set `on_bad_row: drop`):",
        *[f"  row {number} of rows.jsonl: {reason}" for number in range(2, 7)],
        "  and 2 more",
    ]


def test_rows_of_two_files_of_one_name_are_told_apart(write: Write, tmp_path: Path) -> None:
    train = write([GOOD, {**GOOD, "name": ""}])
    (tmp_path / "other").mkdir()
    evaluation = shutil.copy(train, tmp_path / "other" / "rows.jsonl")
    section = DataSection(source=str(train), eval_source=str(evaluation), **{**TEXTS, "images": []})
    split = load_data(section).without(find_bad_rows, policy="drop", hint="")
    assert sorted(split.dropped) == ["row 2 of rows.jsonl", "row 2 of rows.jsonl (held out)"]


def test_dropped_rows_are_counted_and_each_is_named_in_the_metrics(recipe: MakeRecipe, write: Write) -> None:
    good = {"image": "good.png", "Product Name": "a", "description": "b"}
    long = {**good, "description": "b" * 300}
    rows = [good, {**good, "description": ""}, long, good, {**good, "image": "none.png"}, good, good, good]
    values = recipe(**{"data.source": str(write(rows)), "on_bad_row": "drop", "on_too_long": "drop"})
    run = finetune(values, **{"data.eval_rows": 2, "train.max_length": 200, "eval.samples": 0, "train.eval_strategy": "no"})
    metrics = json.loads((run.adapter_dir / "metrics.json").read_text())
    dropped = metrics["dropped_rows"]
    assert sorted(dropped) == ["row 2 of rows.jsonl", "row 3 of rows.jsonl", "row 5 of rows.jsonl"]
    assert dropped["row 2 of rows.jsonl"] == "format 'columns': the answer is empty: column 'description' is blank."
    assert dropped["row 3 of rows.jsonl"] == "it has 374 tokens and the limit is 200"
    assert dropped["row 5 of rows.jsonl"].startswith("picture '")
    assert metrics["train_rows"] + metrics["held_out_rows"] + len(dropped) == len(rows)


def test_a_row_that_only_the_processor_refuses_is_dropped_too(recipe: MakeRecipe, write: Write, tmp_path: Path) -> None:
    good = {"image": "good.png", "Product Name": "a", "description": "b"}
    (tmp_path / "strip.png").write_bytes(png(size=(10_000, 3)))
    rows = [good, {**good, "image": "strip.png"}, good, good]
    values = recipe(**{"data.source": str(write(rows)), "on_bad_row": "drop", "eval.samples": 0})
    assert sorted(finetune(values).metrics["dropped_rows"]) == ["row 2 of rows.jsonl"]


def test_a_row_longer_than_the_limit_is_named_with_its_count_and_the_limit() -> None:
    collator = MultimodalCollator(make_processor("qwen2_vl"), max_length=100)
    rows = [sample(None, "row 1 of t.jsonl"), sample(None, "row 2 of t.jsonl", "b" * 200)]
    length = int(MultimodalCollator(make_processor("qwen2_vl"))([rows[1]])["attention_mask"].sum())
    assert length > 200
    assert said(DatasetError, collator, rows) == (
        f"row 2 of t.jsonl has {length} tokens and the limit is 100: shorten it, lower images.max_pixels, "
        "raise train.max_length, or set `on_too_long: drop`"
    )


# ---- a model


def changed(checkpoint: Path, tmp_path: Path, change: Callable[[Path], Any]) -> str:
    directory = tmp_path / "changed"
    shutil.copytree(checkpoint, directory)
    change(directory)
    return str(directory)


def put(name: str, content: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(content)


def halve(name: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:5000])


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "Qwen2VLProcessor has no chat template: save one with the checkpoint's processor"),
        ("{{ messages }}", "the chat template of Qwen2VLProcessor has no {% generation %} markers, so that answers cannot"),
    ],
)
def test_a_processor_whose_template_cannot_tell_answers_is_refused(template: str | None, sentence: str) -> None:
    processor = make_processor("qwen2_vl")
    processor.chat_template = template
    assert said(ModelError, MultimodalCollator, processor).startswith(sentence)


# ---- a place to write to


def test_a_directory_that_holds_something_is_not_written_over(recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.docx").write_text("three years of work")
    (tmp_path / "run" / "recipe.yaml").write_text("of pancakes")
    told = said(OutputError, finetune, recipe())
    assert told == (
        f"output directory {tmp_path}/run is not empty (it holds recipe.yaml): name another one, or overwrite it with "
        "--overwrite (in Python overwrite=True)"
    )
    told = said(OutputError, finetune, recipe(), overwrite=True)
    assert told == f"output directory {tmp_path}/run holds recipe.yaml and was not made by vlmtune: delete it yourself"
    assert (tmp_path / "run" / "thesis.docx").read_text() == "three years of work"


def test_an_earlier_run_is_kept_where_the_one_that_is_to_replace_it_cannot_start(recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (".vlmtune", "adapter_model.safetensors"):
        (tmp_path / "run" / name).write_text("")
    said(RecipeError, finetune, recipe(**{"lora.targets": ["nothing"]}), overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".vlmtune", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("directory", "sentence"),
    [
        ("{root}/file", "output directory {root}/file is a file: name a directory"),
        ("{root}/file/run", "output directory {root}/file/run is a file: name a directory"),
        ("{root}/" + "x" * 300, "output directory {root}/" + "x" * 300 + " cannot be read: File name too long"),
        ("{root}/a\0b", "output directory {root}/a\0b cannot be read: embedded null byte"),
    ],
)
def test_a_place_that_is_no_directory_is_named(tmp_path: Path, directory: str, sentence: str) -> None:
    (tmp_path / "file").write_text("")
    root = str(tmp_path)
    assert said(OutputError, claim, Path(directory.replace("{root}", root))) == sentence.replace("{root}", root)


def test_a_place_that_the_system_does_not_give_is_named() -> None:
    def make() -> None:
        with disk_errors(Path("/proc/run")):
            Path("/proc/run").mkdir(parents=True)

    assert said(OutputError, make) == "/proc/run cannot be written: No such file or directory"


def test_an_error_that_has_nothing_to_do_with_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "none").read_text()


def test_there_is_nothing_to_resume_without_a_whole_checkpoint(recipe: MakeRecipe, tmp_path: Path) -> None:
    sentence = f"there is nothing to resume: {tmp_path}/run holds no whole checkpoint"
    assert said(OutputError, finetune, recipe(), resume=True) == sentence
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": ')
    assert said(OutputError, finetune, recipe(), resume=True) == sentence


def test_a_checkpoint_of_another_adapter_or_a_damaged_one_is_not_gone_on_from(recipe: MakeRecipe, tmp_path: Path) -> None:
    values = recipe(**{"eval.samples": 0})
    checkpoint = finetune(values).adapter_dir / "checkpoint-2"
    for other in (recipe(**{"lora.r": 4}), recipe(**{"lora.targets": ["q_proj"]}), recipe("text")):
        told = said(RecipeError, finetune, other, resume=True)
        assert told.startswith(f"checkpoint {checkpoint} holds another adapter than this recipe makes: ")
    (checkpoint / "adapter_model.safetensors").write_bytes(b"")
    told = said(OutputError, finetune, values, resume=True)
    assert told.startswith(f"checkpoint {checkpoint} is damaged (")


def test_the_last_checkpoint_is_the_last_whole_one(tmp_path: Path) -> None:
    for name, state in (("9", "{}"), ("10", "{}"), ("11", "{"), ("best", "{}")):
        (tmp_path / f"checkpoint-{name}").mkdir()
        (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("300k")`: a directory on a file system of that size; called again, the same one with another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        options = f"remount,size={size}" if place.is_mount() else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", "--lazy", str(place)], check=True)


STEPS = {"train.max_steps": 4, "train.save_strategy": "steps", "train.save_steps": 2, "eval.samples": 0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
@pytest.mark.parametrize(
    ("size", "whole", "then"),
    [("100k", [], "start again"), ("300k", [2], "resume"), ("600k", [2, 4], "resume")],
    ids=["in the first checkpoint", "in the second checkpoint", "in the adapter"],
)
def test_a_disk_that_fills_up_leaves_no_half_adapter_and_whole_checkpoints_are_gone_on_from(
    recipe: MakeRecipe, small_disk: Callable[[str], Path], size: str, whole: list[int], then: str
) -> None:
    directory = small_disk(size) / "run"
    values = recipe(**STEPS, **{"train.output_dir": str(directory)})
    told = said(OutputError, finetune, values)
    assert told == f"the disk is full while writing {directory} (0 MiB free): make room and {then}"
    assert not list(directory.glob("adapter*"))
    assert [path.name for path in directory.parent.iterdir()] == ["run"]  # no temporary directory either

    small_disk("20m")
    if not whole:
        assert "there is nothing to resume" in said(OutputError, finetune, values, resume=True)
        run = finetune(values, overwrite=True)
    else:
        assert last_checkpoint(directory) == directory / f"checkpoint-{whole[-1]}"
        run = finetune(values, resume=True)
    assert run.metrics["steps"] == 4
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in directory.iterdir()}


def test_a_disk_that_fills_up_leaves_no_half_merged_model(
    recipe: MakeRecipe, small_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = finetune(recipe(**{"eval.samples": 0})).adapter_dir
    out = small_disk("200k") / "merged"
    told = said(OutputError, merge_adapter, adapter, out)
    assert told == f"the merged model needs 0.8 MB, and 0.2 MB are free in {out.parent}: make room or name another place"
    small_disk("744k")
    told = said(OutputError, merge_adapter, adapter, out)
    assert told.startswith(f"the disk is full while writing {out} (")
    assert list(out.parent.iterdir()) == []
    small_disk("20m")
    assert merge_adapter(adapter, out).out_dir == out


def test_a_merge_never_deletes_the_base_it_was_asked_to_overwrite(
    recipe: MakeRecipe, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = changed(checkpoint("qwen2_vl"), tmp_path, lambda directory: None)
    adapter = finetune(recipe(**{"model.name": base, "eval.samples": 0})).adapter_dir
    before = sorted(path.name for path in Path(base).iterdir())
    told = said(OutputError, merge_adapter, adapter, base, overwrite=True)
    assert told == f"output directory {base} is or holds what the merge is made of ({base}): name another one"
    assert sorted(path.name for path in Path(base).iterdir()) == before


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (halve("adapter_model.safetensors"), {}, "the weights of the adapter in {run} cannot be read: "),
        (put("adapter_config.json", "{"), {}, "{run} holds no adapter: adapter_config.json cannot be read ("),
        (lambda _: None, {"dtype": "float7"}, "dtype 'float7' is none of bfloat16, float16 and float32"),
    ],
    ids=["half the weights", "broken config", "unknown dtype"],
)
def test_an_adapter_that_cannot_be_merged_says_why(
    recipe: MakeRecipe, tmp_path: Path, change: Callable[[Path], Any], options: Mapping[str, Any], sentence: str
) -> None:
    run = finetune(recipe(**{"eval.samples": 0})).adapter_dir
    change(run)
    told = said(ModelError, merge_adapter, run, tmp_path / "merged", **options)
    assert told.startswith(sentence.replace("{run}", str(run)))
    assert not (tmp_path / "merged").exists()


# ---- a question


def test_a_question_without_a_column_of_the_template_is_refused(recipe: MakeRecipe) -> None:
    run = finetune(recipe(**{"train.max_steps": 1, "eval.samples": 0}))
    told = said(DatasetError, run.generate, {"Product Nam": "Kite", "image": png()})
    assert told == (
        "row 1 of the given rows: format 'columns': column 'Product Name' is missing; the row has Product Nam, image; "
        "braces that stay are doubled. Did you mean 'Product Name'?"
    ).replace("'Product Name'?", "'Product Nam'?")
    assert isinstance(run.generate({"Product Name": "Kite", "image": png()}), str)  # no answer is needed
    assert run.compare([{"Product Name": "Kite", "image": png()}]).rows[0].expected == ""
    told = said(DatasetError, run.compare, [{"Product Nam": "Kite", "image": png()}])
    assert told.startswith("row 1 of the given rows: format 'columns': column 'Product Name' is missing")


# ---- the command line


def test_the_command_line_prints_the_sentence_and_ends_with_code_2(recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    done = subprocess.run(
        [sys.executable, "-m", "vlmtune.run", str(path), "lora.rank=8"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 2
    assert f"error: {path} has 1 mistake:\n  on the command line: `lora.rank` is not a key of a recipe.\n" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
