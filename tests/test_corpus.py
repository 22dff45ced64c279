"""A corpus of broken inputs, each through `finetune`: it ends in one clear sentence, never in a traceback, a hang or a loss.

A case breaks one thing of a recipe that trains. What single functions say of bad input stands in test_bad_input.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from pictures import headed, noise, png

from vlmtune import DatasetError, ModelError, OutputError, RecipeError, VlmtuneError, finetune
from vlmtune.data import load_data
from vlmtune.recipe import DataSection

SECONDS = 60  # none takes five
Values = dict[str, Any]
Break = Callable[[Path, Values], None]  # writes into a directory, and changes the values of a recipe by dotted key


@dataclass(frozen=True)
class Case:
    error: type[VlmtuneError]
    said: str  # a part of the sentence; {at} is the directory of the rows, {out} the output directory
    broken: Break
    model: str = "qwen2_vl"


class HangError(BaseException):
    """Is no Exception: nobody catches it on the way."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError(f"still going after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---- ways to break a recipe


GOOD = {"image": "good.png", "Product Name": "Kite", "description": "It flies."}
COLUMNS = {"data.prompt": "Name {Product Name}.", "data.response": "{description}", "data.images": "image"}
PLAIN = dict.fromkeys(COLUMNS)  # rows that bring their own turns
ASKED, ANSWERED = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}
CALL = {"role": "assistant", "tool_calls": [{"id": "call00001", "function": {"name": "weigh", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "12 g", "tool_call_id": "call00001"}


def recipe_with(**values: Any) -> Break:
    """`recipe_with(train__seed=-1)`: these values, with two underscores for a dot."""
    return lambda at, given: given.update({key.replace("__", "."): value for key, value in values.items()})


def source(name: str, content: str | bytes, **values: Any) -> Break:
    """The rows are in a file of this content."""

    def change(at: Path, given: Values) -> None:
        (at / name).write_bytes(content.encode() if isinstance(content, str) else content)
        given.update({**COLUMNS, "data.source": str(at / name)})
        recipe_with(**values)(at, given)

    return change


def jsonl(*rows: Any, **values: Any) -> Break:
    return source("rows.jsonl", "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), **values)


def second(row: Any) -> Break:
    """The second of three rows is this one."""
    return jsonl(GOOD, row, GOOD)


def changed(**columns: Any) -> Break:
    return second({**GOOD, **{name.replace("_", " "): value for name, value in columns.items()}})


def own_turns(row: Mapping[str, Any]) -> Break:
    """The second of two rows that bring their own turns."""

    def change(at: Path, given: Values) -> None:
        jsonl({"messages": [ASKED, ANSWERED]}, row)(at, given)
        given.update(PLAIN)

    return change


def talk(*turns: Any, **columns: Any) -> Break:
    return own_turns({"messages": [*turns], **columns})


def asked(*parts: Any) -> Break:
    return talk({"role": "user", "content": [*parts]}, ANSWERED)


def picture(content: bytes) -> Break:
    """The second row's picture is a file of these bytes."""

    def change(at: Path, given: Values) -> None:
        (at / "bad.png").write_bytes(content)
        changed(image="bad.png")(at, given)

    return change


def folder(**files: str | bytes) -> Break:
    """The source is a directory of these files; `a__b` is `a.b`."""

    def change(at: Path, given: Values) -> None:
        (at / "folder").mkdir()
        for name, content in files.items():
            path = at / "folder" / name.replace("__", ".")
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        given.update({**COLUMNS, "data.source": str(at / "folder")})

    return change


def special(make: Callable[[Path], Any], broken: Break) -> Break:
    """Makes something in the directory first."""

    def change(at: Path, given: Values) -> None:
        make(at)
        broken(at, given)

    return change


def template(text: str | bytes) -> Break:
    def change(at: Path, given: Values) -> None:
        (at / "chat.jinja").write_bytes(text.encode() if isinstance(text, str) else text)
        given["chat_template"] = str(at / "chat.jinja")

    return change


def checkpoint_with(change_files: Callable[[Path], Any]) -> Break:
    """The model is a copy of the good one, changed."""

    def change(at: Path, given: Values) -> None:
        shutil.copytree(given["model.name"], at / "model")
        change_files(at / "model")
        given["model.name"] = str(at / "model")

    return change


def put(name: str, content: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(content)


def remove(*names: str) -> Callable[[Path], Any]:
    return lambda directory: [path.unlink() for path in directory.iterdir() if any(name in path.name for name in names)]


def halve(name: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:5000])


def narrow(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (directory / "config.json").write_text(json.dumps(config))


def renamed(model_type: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / "config.json").write_text(json.dumps({"model_type": model_type}))


def output(make: Callable[[Path], Any]) -> Break:
    """The output directory is there already."""
    return lambda at, given: make(Path(given["train.output_dir"]))


def earlier_work(directory: Path) -> None:
    directory.mkdir()
    (directory / "thesis.txt").write_text("three years of work")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content[0].text }}<|im_end|>{% endgeneration %}
{% else %}{% for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}<|im_end|>
{% endif %}{% endfor %}"""


# ---- the corpus


ROW = "row 2 of rows.jsonl: "
CELLS = "cells, wanted 3 as in the header"
HEADER = "image,Product Name,description\n"

ROWS = {
    "a column is missing": Case(
        DatasetError, ROW + "format 'columns': column 'Product Name' is missing", second({"image": None})
    ),
    "a column is misspelt": Case(
        DatasetError, "Did you mean 'Produkt Name'?", second({"image": None, "Produkt Name": "a", "description": "b"})
    ),
    "the answer is empty": Case(DatasetError, ROW + "format 'columns': the answer is empty", changed(description="")),
    "the answer is blank": Case(DatasetError, "column 'description' is blank", changed(description=" \n\t ")),
    "the answer is null": Case(DatasetError, "column 'description' is null", changed(description=None)),
    "the answer is a list": Case(DatasetError, "'description' holds a value of type list", changed(description=["It flies."])),
    "the answer is a mapping": Case(DatasetError, "'description' holds a value of type dict", changed(description={"en": "a"})),
    "half of a UTF-16 pair": Case(
        DatasetError, ROW + "format 'columns': the text of turn 2 holds half of a UTF-16 pair", changed(description="\ud800")
    ),
    "a row is a list": Case(DatasetError, ROW + "a row is a mapping of columns to values, found", second([1, 2])),
    "a row is null": Case(DatasetError, ROW + "a row is a mapping of columns to values, found null", second(None)),
    "a row is empty": Case(DatasetError, ROW + "format 'columns': column 'Product Name' is missing", second({})),
    "unknown columns": Case(DatasetError, ROW + "format 'auto': the row has foo; openai wants messages", own_turns({"foo": 1})),
    "two formats at once": Case(
        DatasetError, "the row fits openai and sharegpt", talk(ASKED, ANSWERED, conversations=[{"from": "human", "value": "a"}])
    ),
    "a template's brace is open": Case(DatasetError, "the template has a lone '{'", jsonl(GOOD, data__prompt="{Product Name")),
    "a template names a column bare": Case(
        DatasetError, "is a column's name, wanted '{description}'", jsonl(GOOD, data__response="description")
    ),
    "no template of the answer": Case(DatasetError, "response= is not given", jsonl(GOOD, data__response=None)),
    "a format nobody knows": Case(DatasetError, "Did you mean 'openai'?", jsonl(GOOD, data__format="opnai")),
    "templates beside a format": Case(DatasetError, "prompt= and response= are given", jsonl(GOOD, data__format="openai")),
    "a system template's column": Case(DatasetError, "column 'nobody' is missing", jsonl(GOOD, data__system="{nobody}")),
    "placeholders without pictures": Case(
        DatasetError, "2 <image> placeholders, 1 pictures", jsonl(GOOD, data__prompt="<image><image>{Product Name}")
    ),
    "a column of pictures is missing": Case(DatasetError, "column 'photo' is missing", jsonl(GOOD, data__images="photo")),
    "messages are a text": Case(DatasetError, "'messages' holds a value of type str", own_turns({"messages": "hi"})),
    "no turns": Case(DatasetError, "there is no user's turn", own_turns({"messages": []})),
    "a role nobody has": Case(DatasetError, "turn 2 has the role 'bot'", talk(ASKED, {"role": "bot", "content": "a"})),
    "no role": Case(DatasetError, "turn 2 has the role None", talk(ASKED, {"content": "a"})),
    "two questions in a row": Case(DatasetError, "turn 2 is the user's, wanted the assistant's", talk(ASKED, ASKED, ANSWERED)),
    "the assistant begins": Case(DatasetError, "turn 1 is the assistant's, wanted the user's", talk(ANSWERED, ASKED, ANSWERED)),
    "the user has the last word": Case(DatasetError, "the last turn is the user's", talk(ASKED, ANSWERED, ASKED)),
    "a late system message": Case(
        DatasetError, "a system message comes first or not at all", talk(ASKED, {"role": "system", "content": "a"}, ANSWERED)
    ),
    "a turn is null": Case(DatasetError, "turn 3 is null", talk(ASKED, ANSWERED, None)),
    "a content is a number": Case(
        DatasetError, "the content of turn 1 (user) is a value of type int", talk({**ASKED, "content": 5}, ANSWERED)
    ),
    "a question is blank": Case(DatasetError, "the user's text is empty in turn 1", talk({**ASKED, "content": " "}, ANSWERED)),
    "the answer is a picture": Case(
        DatasetError,
        "the answer is empty in turn 2",
        talk(ASKED, {"role": "assistant", "content": [{"type": "image", "image": "good.png"}]}),
    ),
    "a part is a text": Case(DatasetError, "a part of turn 1 (user) is a value of type str", asked("Which?")),
    "a part of an unknown type": Case(DatasetError, "a part of turn 1 (user) has the type 'audio'", asked({"type": "audio"})),
    "a part of text without text": Case(DatasetError, "has null as its text", asked({"type": "text"})),
    "a part of a picture without one": Case(
        DatasetError, "1 <image> placeholders, 0 pictures", asked({"type": "image"}, {"type": "text", "text": "a"})
    ),
    "parts that are nested deep": Case(
        DatasetError,
        "lists or mappings of the row hold each other hundreds deep",
        own_turns({"messages": [{"role": "user", "content": [{"type": "video", "video": json.loads(nested(480))}]}, ANSWERED]}),
    ),
    "a video that is not there": Case(
        DatasetError,
        ROW + "the model's processor refuses it",
        asked({"type": "video", "video": "none.mp4"}, {"type": "text", "text": "a"}),
    ),
    "a tool's result without a call": Case(
        DatasetError, "a tool's result follows upon tool_calls", talk(ASKED, RESULT, ANSWERED)
    ),
    "a result of another call": Case(
        DatasetError,
        "answers the call 'call00009', which nobody made",
        talk(ASKED, CALL, {**RESULT, "tool_call_id": "call00009"}, ANSWERED),
    ),
    "calls that the template drops": Case(
        DatasetError, "the chat template of Qwen2VLProcessor leaves tool calls out", talk(ASKED, CALL, RESULT, ANSWERED)
    ),
    "a call of nothing": Case(
        DatasetError, "call 1 of turn 2 (assistant) names no function", talk(ASKED, {**CALL, "tool_calls": [{}]})
    ),
    "arguments that are no JSON": Case(
        DatasetError,
        "the arguments of call 1 of turn 2 (assistant) cannot be read as JSON",
        talk(ASKED, {**CALL, "tool_calls": [{"function": {"name": "weigh", "arguments": "{"}}]}),
    ),
    "a user who calls": Case(
        DatasetError, "which only the assistant's turns have", talk({**ASKED, "tool_calls": [1]}, ANSWERED)
    ),
    "tools that are no JSON": Case(DatasetError, "column 'tools' cannot be read as JSON", talk(ASKED, ANSWERED, tools="weigh")),
    "tools without names": Case(DatasetError, "tool 1 in column 'tools' has no name", talk(ASKED, ANSWERED, tools=[{}])),
    "ShareGPT of strangers": Case(
        DatasetError, "turn 1 has the role 'alien'", own_turns({"conversations": [{"from": "alien", "value": "a"}]})
    ),
    "ShareGPT with too few pictures": Case(
        DatasetError,
        "2 <image> placeholders, 1 pictures",
        own_turns(
            {
                "image": "good.png",
                "conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "a"}],
            }
        ),
    ),
    "Alpaca without an output": Case(DatasetError, "the row has instruction; ", own_turns({"instruction": "Write."})),
    "an empty completion": Case(
        DatasetError, "format 'prompt_completion': the answer is empty", own_turns({"prompt": "a", "completion": ""})
    ),
    "a picture for a text model": Case(
        DatasetError, "row 1 of rows.jsonl: has a picture, and text models take none", jsonl(GOOD), "text"
    ),
    "a picture in Pixtral's answer": Case(
        DatasetError,
        "Pixtral: a part must be a text or, in a user message, an image",
        talk(ASKED, {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "good.png"}]}),
        "pixtral",
    ),
    "a video for Llama": Case(
        DatasetError,
        "Llama 3.2 Vision: a part must be a text or an image",
        asked({"type": "video", "video": "a.mp4"}, {"type": "text", "text": "a"}),
        "mllama",
    ),
    "a row longer than the model": Case(DatasetError, "tokens and the limit is 2048", changed(description="long " * 800)),
    "all rows longer than the limit": Case(
        DatasetError, "no others are left", recipe_with(train__max_length=9, on_too_long="drop")
    ),
    "no smaller picture would do": Case(
        DatasetError, "it has 81 tokens and the limit is 9", jsonl(GOOD, GOOD, train__max_length=9, on_too_long="shrink")
    ),
    "all rows bad and dropped": Case(
        DatasetError,
        "3 of 3 rows cannot be used (no others are left)",
        jsonl(*[{**GOOD, "image": "none.png"}] * 3, on_bad_row="drop"),
    ),
    "more held out than there are": Case(
        DatasetError,
        "rows.jsonl has 2 rows; 2 held out for evaluation leave none to train on",
        jsonl(GOOD, GOOD, data__eval_rows=2),
    ),
    "a split of one file": Case(DatasetError, "is one file and has no split 'test'", jsonl(GOOD, data__eval_split="test")),
}

BAD = ROW + "picture '{at}/bad.png' "
PICTURES = {
    "half a PNG": Case(DatasetError, BAD + "is truncated or damaged", picture(noise("PNG")[:4000])),
    "half a JPEG": Case(DatasetError, BAD + "is truncated or damaged", picture(noise("JPEG")[:4000])),
    "half a GIF": Case(DatasetError, BAD + "is truncated or damaged", picture(noise("GIF")[:4000])),
    "a PNG with a flipped byte": Case(
        DatasetError, BAD + "is truncated or damaged", picture(noise("PNG")[:2000] + b"????" + noise("PNG")[2004:])
    ),
    "zero bytes": Case(DatasetError, BAD + "is empty (zero bytes)", picture(b"")),
    "a text": Case(DatasetError, BAD + "is not a picture in a format that Pillow reads", picture(b"hello")),
    "an answer of the web": Case(DatasetError, BAD + "is not a picture", picture(b"<html>404 Not Found</html>")),
    "a pointer of git-lfs": Case(
        DatasetError, BAD + "is not a picture", picture(b"version https://git-lfs.github.com/spec/v1\n")
    ),
    "an SVG": Case(DatasetError, BAD + "is not a picture", picture(b"<svg xmlns='http://www.w3.org/2000/svg'/>")),
    "a WebP of nothing": Case(DatasetError, BAD + "is truncated or damaged", picture(b"RIFF\x10\0\0\0WEBPVP8 ")),
    "a BMP of nothing": Case(DatasetError, BAD + "is truncated or damaged", picture(b"BM" + b"\0" * 60)),
    "no pixels": Case(DatasetError, BAD + "is not a picture", picture(headed(0, 10))),
    "a bomb": Case(DatasetError, BAD + "has 3,600,000,000 pixels", picture(headed(60_000, 60_000))),
    "a small bomb": Case(DatasetError, BAD + "has 90,000,000 pixels", picture(headed(10_000, 9_000))),
    "a header and no pixels": Case(DatasetError, BAD + "is truncated or damaged", picture(headed(5000, 5000))),
    "a strip for Qwen": Case(DatasetError, "its pictures have 10000×3 pixels", picture(png(size=(10_000, 3)))),
    "a strip for Pixtral": Case(DatasetError, "its pictures have 3×10000 pixels", picture(png(size=(3, 10_000))), "pixtral"),
    "no file": Case(DatasetError, ROW + "picture '{at}/none.png' is not there: no file", changed(image="none.png")),
    "no file outside": Case(DatasetError, "is not there", changed(image="../../none.png")),
    "no absolute file": Case(DatasetError, "picture '/no/such.png' is not there", changed(image="/no/such.png")),
    "a directory": Case(DatasetError, "is a directory, wanted a file", changed(image="..")),
    "a pipe": Case(
        DatasetError, "is a pipe, wanted a file", special(lambda at: os.mkfifo(at / "pipe.png"), changed(image="pipe.png"))
    ),
    "a loop of links": Case(
        DatasetError,
        "cannot be opened: Too many levels of symbolic links",
        special(lambda at: (at / "loop.png").symlink_to("loop.png"), changed(image="loop.png")),
    ),
    "a null character": Case(DatasetError, "cannot be opened: embedded null byte", changed(image="good\0.png")),
    "a name that is too long": Case(DatasetError, "cannot be opened: File name too long", changed(image="x" * 5000)),
    "half of a UTF-16 pair": Case(DatasetError, "surrogates not allowed", changed(image="\ud800.png")),
    "a URL that nobody answers": Case(DatasetError, "cannot be downloaded", changed(image="http://127.0.0.1:9/a.png")),
    "a URL that is none": Case(DatasetError, "cannot be downloaded: Invalid IPv6 URL", changed(image="https://[a")),
    "a data URL without a comma": Case(DatasetError, "has no comma", changed(image="data:image/png;base64")),
    "base64 of a text": Case(
        DatasetError, "is not a picture", changed(image="data:image/png;base64," + base64.b64encode(b"hello").decode())
    ),
    "base64 that ends early": Case(DatasetError, "is not valid base64", changed(image="data:image/png;base64,iVBORw0KGgo")),
    "base64 of nothing": Case(DatasetError, "is empty (zero bytes)", changed(image="data:image/png;base64,@@@@")),
    "a number": Case(DatasetError, "column 'image' holds a value of type int", changed(image=5)),
    "a mapping without one": Case(
        DatasetError, "column 'image' holds a mapping without a picture", changed(image={"file": "a"})
    ),
    "a broken one in a folder": Case(
        DatasetError,
        "row 1 of folder: picture '{at}/folder/a.png' is truncated or damaged",
        folder(a__png=png()[:50], metadata__csv="file_name,Product Name,description\na.png,a,b\n"),
    ),
    "one that a folder lacks": Case(
        DatasetError,
        "row 2 of folder: picture '{at}/folder/b.png' is not there",
        folder(a__png=png(), metadata__csv="file_name,Product Name,description\na.png,a,b\nb.png,a,b\n"),
    ),
}

FILES = {
    "JSON that ends early": Case(
        DatasetError, "line 2 of {at}/rows.jsonl is not JSON: Expecting ':' delimiter at column 8", jsonl(GOOD, '{"name"')
    ),
    "an array in a line": Case(DatasetError, ROW + "a row is a mapping of columns to values", second([GOOD, GOOD])),
    "an array over lines": Case(DatasetError, "line 1 of {at}/rows.jsonl is not JSON", jsonl(json.dumps([GOOD], indent=1))),
    "two objects in a line": Case(
        DatasetError, "line 1 of {at}/rows.jsonl is not JSON: Extra data", jsonl(json.dumps(GOOD) * 2)
    ),
    "single quotes": Case(DatasetError, "line 1 of {at}/rows.jsonl is not JSON", jsonl(str(GOOD))),
    "a key twice": Case(
        DatasetError,
        "line 2 of {at}/rows.jsonl has the key 'description' more than once",
        jsonl(GOOD, '{"image": "good.png", "Product Name": "a", "description": "b", "description": "c"}'),
    ),
    "JSON that is nested deep": Case(
        DatasetError, "cannot be read as JSON: maximum recursion depth", jsonl(GOOD, nested(100_000))
    ),
    "a number of 5000 digits": Case(
        DatasetError, "line 1 of {at}/rows.jsonl cannot be read as JSON", jsonl('{"a": ' + "9" * 5000 + "}")
    ),
    "a null byte": Case(DatasetError, "line 2 of {at}/rows.jsonl is not JSON", jsonl(GOOD, json.dumps(GOOD) + "\0")),
    "not UTF-8": Case(DatasetError, "{at}/rows.jsonl is not UTF-8", source("rows.jsonl", b'{"a": "\xe4"}')),
    "UTF-16": Case(DatasetError, "{at}/rows.jsonl is not UTF-8", source("rows.jsonl", json.dumps(GOOD).encode("utf-16"))),
    "gzip under another name": Case(
        DatasetError, "is not UTF-8", source("rows.jsonl", gzip.compress(json.dumps(GOOD).encode()))
    ),
    "gzip": Case(DatasetError, "is a .gz; files of .jsonl", source("rows.jsonl.gz", gzip.compress(b"{}"))),
    "nothing": Case(DatasetError, "{at}/rows.jsonl holds no rows", jsonl("")),
    "lines of nothing": Case(DatasetError, "{at}/rows.jsonl holds no rows", jsonl("\n \n")),
    "lines in a .json": Case(DatasetError, "is not JSON: Extra data at line 2", source("a.json", f"{json.dumps(GOOD)}\n" * 2)),
    "a mapping in a .json": Case(DatasetError, "holds a dict; a list of rows is wanted", source("a.json", json.dumps(GOOD))),
    "a spreadsheet": Case(DatasetError, "a.xlsx is a .xlsx; files of .jsonl", source("a.xlsx", b"PK\3\4")),
    "no suffix": Case(DatasetError, "is a file without suffix", source("rows", "a")),
    "CSV with only a header": Case(DatasetError, "{at}/a.csv holds no rows", source("a.csv", HEADER)),
    "CSV of nothing": Case(DatasetError, "{at}/a.csv holds no rows", source("a.csv", "")),
    "CSV with a cell too many": Case(
        DatasetError, "row 2 of {at}/a.csv has 4 " + CELLS, source("a.csv", HEADER + "good.png,a,b\ngood.png,a,b,c\n")
    ),
    "CSV with a cell too many in every row": Case(
        DatasetError, "row 1 of {at}/a.csv has 4 " + CELLS, source("a.csv", HEADER + "good.png,a,b,c\n" * 2, data__images=[])
    ),
    "CSV with a comma behind every row": Case(
        DatasetError, "row 1 of {at}/a.csv has 4 " + CELLS, source("a.csv", HEADER + "good.png,a,b,\n" * 2)
    ),
    "CSV with a cell too few": Case(
        DatasetError, "row 1 of {at}/a.csv has 2 " + CELLS, source("a.csv", HEADER + "good.png,a\n")
    ),
    "CSV with an open quote": Case(
        DatasetError,
        "line 3 of {at}/a.csv cannot be read: unexpected end of data",
        source("a.csv", HEADER + 'good.png,a,"b\nc,d,e\n'),
    ),
    "CSV with a quote in a cell": Case(
        DatasetError, "line 2 of {at}/a.csv cannot be read: ',' expected", source("a.csv", HEADER + 'good.png,a,"12" wide\n')
    ),
    "CSV with two columns of a name": Case(DatasetError, "has 2 columns of the name 'a'", source("a.csv", "a,b,a\n1,2,3\n")),
    "CSV with semicolons": Case(
        DatasetError, "the row has image;Product Name;description", source("a.csv", HEADER.replace(",", ";") + "good.png;a;b\n")
    ),
    "CSV in Latin-1": Case(
        DatasetError, "{at}/a.csv is not UTF-8", source("a.csv", (HEADER + "good.png,ä,b\n").encode("latin-1"))
    ),
    "TSV with commas": Case(
        DatasetError, "the row has image,Product Name,description", source("a.tsv", HEADER + "good.png,a,b\n")
    ),
    "CSV in a folder with a cell too many": Case(
        DatasetError, "row 1 of {at}/folder/a.csv has 4 " + CELLS, folder(a__csv=HEADER + "good.png,a,b,c\n")
    ),
    "metadata with a cell too many": Case(
        DatasetError,
        "row 1 of {at}/folder/metadata.csv has 4 " + CELLS,
        folder(a__png=png(), metadata__csv="file_name,Product Name,description\na.png,a,b,\n"),
    ),
    "metadata without names of files": Case(
        DatasetError, "`file_name`", folder(a__png=png(), metadata__csv="name,Product Name,description\na.png,a,b\n")
    ),
    "metadata that is no JSON": Case(
        DatasetError, "{at}/folder cannot be read: JSON parse error", folder(a__png=png(), metadata__jsonl='{"file_name":')
    ),
    "pictures without a word": Case(DatasetError, "column 'Product Name' is missing; the row has image", folder(a__png=png())),
    "an empty folder": Case(DatasetError, "{at}/folder cannot be read", folder()),
    "a folder of texts": Case(DatasetError, "column 'Product Name' is missing; the row has text", folder(a__txt="hello")),
    "Parquet of nothing": Case(DatasetError, "Parquet file size is 0 bytes", source("a.parquet", b"")),
    "Parquet that ends early": Case(
        DatasetError, "{at}/a.parquet cannot be read", source("a.parquet", b"PAR1 and then nothing")
    ),
    "Parquet without rows": Case(
        DatasetError,
        "{at}/a.parquet holds no rows",
        special(
            lambda at: datasets.Dataset.from_dict({"name": []}).to_parquet(at / "a.parquet"),
            lambda at, given: given.update({"data.source": str(at / "a.parquet")}),
        ),
    ),
    "Arrow of nothing": Case(DatasetError, "{at}/a.arrow cannot be read", source("a.arrow", b"ARROW1")),
    "a directory under a file's name": Case(
        DatasetError,
        "cannot be read: Is a directory",
        special(lambda at: (at / "a.jsonl").mkdir(), lambda at, given: given.update({"data.source": str(at / "a.jsonl")})),
    ),
    "a pipe": Case(
        DatasetError,
        "is a pipe, wanted a file",
        special(lambda at: os.mkfifo(at / "a.jsonl"), lambda at, given: given.update({"data.source": str(at / "a.jsonl")})),
    ),
    "a file that is not there": Case(
        DatasetError, "data source none.jsonl cannot be read: No such file", recipe_with(data__source="none.jsonl")
    ),
    "a data set that is not there": Case(
        DatasetError, "nobody/nothing is no file, no directory and no data set", recipe_with(data__source="nobody/nothing")
    ),
}

TEMPLATES = {
    "no file": Case(RecipeError, "`chat_template`: /no/such.jinja cannot be read", recipe_with(chat_template="/no/such.jinja")),
    "a directory": Case(RecipeError, "`chat_template`: / cannot be read", recipe_with(chat_template="/")),
    "not UTF-8": Case(RecipeError, "chat.jinja cannot be read: 'utf-8' codec", template(b"\xff\xfe")),
    "nothing": Case(ModelError, "has no {% generation %} markers", template("")),
    "no markers": Case(ModelError, "has no {% generation %} markers", template("{{ messages[0].content }}")),
    "a syntax error": Case(ModelError, "the chat template is no valid Jinja: line 7: ", template(TEMPLATE + "{% if %}")),
    "a tag nobody knows": Case(
        ModelError, "is no valid Jinja: line 1: Encountered unknown tag 'fro'", template("{% fro x in y %}" + TEMPLATE)
    ),
    "a function nobody has": Case(
        DatasetError,
        "the model's chat template refuses it (its pictures have 40×50 pixels): 'now' is undefined",
        template(TEMPLATE + "{{ now() }}"),
    ),
    "it raises": Case(DatasetError, "chat template refuses it", template(TEMPLATE + "{{ raise_exception('no thanks') }}")),
    "it leaves the sandbox": Case(DatasetError, "is unsafe", template(TEMPLATE + "{{ ''.__class__.__mro__ }}")),
    "it goes on for ever": Case(DatasetError, "Range too big", template(TEMPLATE + "{% for i in range(10**12) %}{% endfor %}")),
    "it drops pictures": Case(
        DatasetError, "Found total 0 <|image_pad|> tokens and 1 images", template(TEMPLATE.replace("<|image_pad|>", ""))
    ),
    "it writes pictures twice": Case(
        DatasetError,
        "Found total 2 <|image_pad|> tokens and 1 images",
        template(TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * 2)),
    ),
    "it drops answers": Case(
        ModelError, "leaves the answers of row ", template(TEMPLATE.replace("{{ message.content[0].text }}", ""))
    ),
    "it drops stop tokens": Case(
        ModelError, "trains no stop token in row ", template(TEMPLATE.replace("<|im_end|>{% endgen", "{% endgen"))
    ),
    "a stop token behind the mark": Case(
        ModelError,
        "trains no stop token in row ",
        template(TEMPLATE.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")),
    ),
    "a stop token that is split": Case(
        ModelError, "trains no stop token in row ", template(TEMPLATE.replace("<|im_end|>{% endgen", "<|im_ end|>{% endgen"))
    ),
    "the prompt is marked": Case(
        ModelError,
        "tokens of the prompt are in the loss",
        special(
            lambda at: None,
            lambda at, given: [
                template(
                    "{% generation %}"
                    + TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
                    + "{% endgeneration %}"
                )(at, given),
                given.update(doctor=True),
            ],
        ),
    ),
    "another model's": Case(
        DatasetError, "Found total 0 <|image_pad|> tokens and 1 images", template(TEMPLATE.replace("<|image_pad|>", "[IMG]"))
    ),
}


def one(key: str, value: Any, said: str, **others: Any) -> Case:
    """A recipe with one wrong value, and what is said of it behind its key."""
    return Case(RecipeError, said, recipe_with(**{key.replace(".", "__"): value}, **others))


RECIPES = {
    "an unknown key": one("lora.rank", 8, "`lora.rank` is not a key of a recipe"),
    "a misspelt key": one("model.quantisation", "nf4", "Did you mean 'quantization'?"),
    "a misspelt section": one("trian.seed", 1, "Did you mean 'train'?"),
    "a misspelt field of TRL": one(
        "train.learning_rat", 1, "`train.learning_rat` is not a field of trl.SFTConfig. Did you mean 'learning_rate'?"
    ),
    "a word for a number": one("lora.r", "eight", "`lora.r` is 'eight': input should be a valid integer"),
    "a section that is a number": one("lora", 5, "`lora` is 5: a section is wanted, with keys such as `r`"),
    "a list for a number": one("train.per_device_train_batch_size", [4], "`train.per_device_train_batch_size` is [4]"),
    "no rows at once": one("train.per_device_train_batch_size", 0, "is 0: input should be greater than 0"),
    "no epochs": one("train.num_train_epochs", 0, "`train.num_train_epochs` is 0"),
    "a negative seed": one("train.seed", -1, "`train.seed` is -1: input should be 0 or more"),
    "a negative rank": one("lora.r", -8, "`lora.r` is -8: input should be greater than 0"),
    "a dropout of one": one("lora.dropout", 1, "`lora.dropout` is 1: input should be less than 1"),
    "a rate that is infinite": one(
        "train.learning_rate", float("inf"), "`train.learning_rate` is inf: input should be a finite number"
    ),
    "a dtype nobody has": one("model.dtype", "float7", "`model.dtype` is 'float7'"),
    "a quantisation nobody has": one("model.quantization", "nf3", "`model.quantization` is 'nf3'"),
    "a policy nobody has": one("on_too_long", "cut", "`on_too_long` is 'cut'"),
    "two ways to hold out": one(
        "data.eval_rows", 2, "data.eval_fraction and data.eval_rows exclude each other", data__eval_fraction=0.5
    ),
    "a fraction above one": one("data.eval_fraction", 1.5, "`data.eval_fraction` is 1.5"),
    "pixels the wrong way round": one(
        "images.min_pixels", 9000, "min_pixels is 9000 and above max_pixels, 784", images__max_pixels=784
    ),
    "a prompt read as a mapping": one("data.prompt", {"Product Name": None}, "put the text in quotes"),
    "a loop of references": one("data.system", "${data.system}", "recipe"),
    "a reference to nothing": one("data.system", "${nobody}", "nobody"),
    "packing within train": one("train.packing", True, "`train.packing` is not for a recipe"),
    "a resume within train": one(
        "train.resume_from_checkpoint", "a", "`--resume` (resume=True) goes on from the last checkpoint"
    ),
    "accelerate's own settings": one(
        "train.accelerator_config", {"dispatch_batches": True}, "`train.accelerator_config` is not for a recipe"
    ),
    "a parallelism": one("train.parallelism_config", {"tp_size": 2}, "`train.parallelism_config` is not for a recipe"),
    "a cut": one("train.truncation_mode", "keep_start", "nothing is cut"),
    "beta of five": one("train.adam_beta1", 5, "`train.adam_beta1` is 5: input should be 0 or more, and below 1"),
    "beta below zero": one("train.adam_beta2", -1, "`train.adam_beta2` is -1"),
    "epsilon below zero": one("train.adam_epsilon", -1, "`train.adam_epsilon` is -1"),
    "smoothing of three": one("train.label_smoothing_factor", 3, "`train.label_smoothing_factor` is 3"),
    "an optimiser nobody has": one("train.optim", "sophia", "sophia is not a valid OptimizerNames"),
    "an optimiser that is not installed": one(
        "train.optim", "galore_adamw", "`train.optim` with `train.optim_args`: You need to install"
    ),
    "odd options of an optimiser": one("train.optim_args", "fast", "`train.optim` with `train.optim_args`: "),
    "options that contradict": one(
        "train.optim_args", "nesterov=true", "Nesterov momentum requires a momentum", train__optim="sgd"
    ),
    "a schedule nobody has": one("train.lr_scheduler_type", "linar", "`train` section: linar is not a valid SchedulerType"),
    "odd options of a schedule": one(
        "train.lr_scheduler_kwargs",
        {"cycles": 2},
        "`train.lr_scheduler_kwargs`: get_linear_schedule_with_warmup() got an unexpected",
    ),
    "a schedule without its option": one(
        "train.lr_scheduler_type", "cosine_with_min_lr", "One of min_lr or min_lr_rate should be set"
    ),
    "a schedule that divides by zero": one(
        "train.lr_scheduler_kwargs",
        {"timescale": 0},
        "`train.lr_scheduler_kwargs`: division by zero",
        train__lr_scheduler_type="inverse_sqrt",
    ),
    "a schedule that waits for losses": one("train.lr_scheduler_type", "reduce_lr_on_plateau", "requires an eval strategy"),
    "a report to nobody": one("train.report_to", "nobody", "`train.report_to` names nobody"),
    "a report to what is not installed": one("train.report_to", ["tensorboard", "wandb"], "`train.report_to` names wandb"),
    "a level of the log": one("train.log_level", "loud", "`train.log_level` is 'loud': input should be one of detail"),
    "a compiler's mode": one("train.torch_compile_mode", "fast", "`train.torch_compile_mode`: Unrecognized mode=fast"),
    "liger that is not installed": one(
        "train.use_liger_kernel", True, "`train.use_liger_kernel` is true, and liger-kernel is not installed"
    ),
    "deepspeed that is not installed": one(
        "train.deepspeed", "none.json", "`train.deepspeed` is given, and deepspeed is not installed"
    ),
    "fsdp of nothing": one("train.fsdp", "half_shard", "Unknown `fsdp` option: half_shard"),
    "a GPU's offloading": one(
        "train.activation_offloading", True, "`train.activation_offloading` is true, and there is no GPU"
    ),
    "a GPU's numbers": one("train.tf32", True, "tf32"),
    "a TPU's debugging": one("train.debug", "tpu_metrics_debug", "`train.debug` has tpu_metrics_debug"),
    "a way to start workers": one(
        "train.dataloader_multiprocessing_context",
        "clone",
        "`train.dataloader_multiprocessing_context`: ",
        train__dataloader_num_workers=1,
    ),
    "rows ahead of none": one("train.dataloader_prefetch_factor", 0, "`train.dataloader_prefetch_factor` is 0"),
    "the hub, offline": one("train.push_to_hub", True, "offline mode is enabled"),
    "a loss nobody has": one("train.loss_type", "hinge", "Invalid `loss_type` hinge"),
    "a mixture that is none": one("train.router_aux_loss_coef", 1.0, "`router_aux_loss_coef` is set to 1.0"),
    "evaluations of nothing": one("train.eval_strategy", "steps", "`train.eval_strategy` needs held-out rows"),
    "an evaluation before all": one("train.eval_on_start", True, "`train.eval_on_start` needs held-out rows"),
    "an early stop of nothing": one("eval.early_stop_patience", 2, "`eval.early_stop_patience` needs held-out rows"),
    "an early stop without the best": one(
        "eval.early_stop_patience",
        2,
        "`train.load_best_model_at_end` is false",
        train__load_best_model_at_end=False,
        data__eval_rows=2,
    ),
    "evaluations gathered by none": one(
        "train.eval_accumulation_steps", 0, "`train.eval_accumulation_steps` is 0", data__eval_rows=2
    ),
    "the best by what is not measured": one(
        "train.metric_for_best_model",
        "bleu",
        "`train.metric_for_best_model` is 'bleu'; an evaluation measures loss",
        data__eval_rows=2,
    ),
    "the greatest loss": one(
        "train.greater_is_better",
        True,
        "of two losses the smaller is better",
        train__load_best_model_at_end=True,
        data__eval_rows=2,
    ),
    "saved between evaluations": one(
        "train.load_best_model_at_end",
        True,
        "requires the save and eval strategy to match",
        train__save_strategy="no",
        data__eval_rows=2,
    ),
    "a number of layers": one(
        "train.gradient_checkpointing_kwargs", {"every_n_layers": 0}, "every_n_layers` is 0: it should be 1 or more"
    ),
    "layers as a text": one("train.gradient_checkpointing_kwargs", "every 2", "a mapping is wanted"),
    "reentrant checkpointing": one("train.gradient_checkpointing_kwargs", {"use_reentrant": True}, "use_reentrant` is true"),
    "targets that match nothing": one("lora.targets", ["q_prj"], "`lora.targets` names q_prj"),
    "targets of the tower": one("lora.targets", ["qkv"], "`lora.targets` names qkv, and no linear module of the language part"),
    "no targets": one("lora.targets", [], "`lora.targets` is []"),
    "a pack shorter than a row": Case(DatasetError, "tokens and the limit is 9", recipe_with(packing__length=9)),
    "features of a tower that learns": one("vision_cache", "memory", "vision_cache", lora__scope="all"),
    "a family nobody has": Case(ModelError, "Did you mean 'qwen2_vl'?", recipe_with(model__family="qwen2vl")),
    "another model's family": Case(
        DatasetError, "Found total 0 <|image_pad|> tokens and 1 images", recipe_with(model__family="mllama")
    ),
    "an attention nobody has": Case(ModelError, 'attn_implementation="fast"', recipe_with(model__attention="fast")),
}

COPY = "{at}/model"
MODELS = {
    "no directory": Case(ModelError, "model /no/such: there is no such directory", recipe_with(model__name="/no/such")),
    "none on the hub": Case(
        ModelError, "no/such: no checkpoint to be found in this hub id", recipe_with(model__name="no/such")
    ),
    "a name that cannot be": Case(ModelError, "model a b/c d: no checkpoint to be found", recipe_with(model__name="a b/c d")),
    "no processor": Case(ModelError, COPY + " has no usable processor", checkpoint_with(remove("processor", "token"))),
    "no image processor": Case(ModelError, COPY + " has no usable processor", checkpoint_with(remove("processor"))),
    "a broken processor": Case(
        ModelError, COPY + " has no usable processor", checkpoint_with(put("processor_config.json", "{"))
    ),
    "an empty tokenizer": Case(ModelError, COPY + " has no usable processor", checkpoint_with(put("tokenizer.json", "{}"))),
    "no config": Case(
        ModelError, COPY + ": no checkpoint to be found in this directory", checkpoint_with(remove("config.json"))
    ),
    "a broken config": Case(ModelError, COPY + ": no checkpoint to be found", checkpoint_with(put("config.json", "{"))),
    "a config that is a list": Case(
        ModelError, COPY + ": no checkpoint to be found", checkpoint_with(put("config.json", "[]"))
    ),
    "a type nobody knows": Case(ModelError, COPY + ": no checkpoint to be found", checkpoint_with(renamed("x"))),
    "a model that writes no text": Case(
        ModelError, COPY + " cannot be loaded: Unrecognized configuration class", checkpoint_with(renamed("vit"))
    ),
    "no weights": Case(ModelError, COPY + " cannot be loaded", checkpoint_with(remove("safetensors"))),
    "half the weights": Case(ModelError, COPY + " cannot be loaded", checkpoint_with(halve("model.safetensors"))),
    "weights of no bytes": Case(ModelError, COPY + " cannot be loaded", checkpoint_with(put("model.safetensors", ""))),
    "weights of another shape": Case(ModelError, COPY + " cannot be loaded", checkpoint_with(narrow)),
    "no chat template": Case(ModelError, "Qwen2VLProcessor has no chat template", checkpoint_with(remove("chat_template"))),
    "a text model with a tower": Case(
        RecipeError, "a text model has no vision tower", recipe_with(lora__scope="vision"), "text"
    ),
    "pixels for Llama": Case(
        RecipeError, "are not settings of mllama's processor", recipe_with(images__max_pixels=1000), "mllama"
    ),
}

OUTPUTS = {
    "earlier work": Case(OutputError, "{out} is not empty (it holds thesis.txt)", output(earlier_work)),
    "a file": Case(OutputError, "{out} is a file: name a directory", output(lambda path: path.write_text(""))),
    "a null character": Case(OutputError, "embedded null byte", recipe_with(train__output_dir="a\0b")),
    "a name that is too long": Case(OutputError, "File name too long", recipe_with(train__output_dir="x" * 300)),
    "a place that is not given": Case(OutputError, "cannot be written", recipe_with(train__output_dir="/proc/run")),
}

CORPUS = {
    f"{kind}: {name}": case
    for kind, cases in {
        "row": ROWS,
        "picture": PICTURES,
        "file": FILES,
        "template": TEMPLATES,
        "recipe": RECIPES,
        "model": MODELS,
        "output": OUTPUTS,
    }.items()
    for name, case in cases.items()
}


@pytest.fixture
def broken(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[[Case], dict[str, Any]]:
    """`broken(case)`: the recipe of a case, its files written."""

    def make(case: Case) -> dict[str, Any]:
        good = recipe(case.model)
        at = tmp_path / "rows"
        at.mkdir()
        (at / "good.png").write_bytes(png())
        values = {"model.name": good["model"]["name"], "train.output_dir": good["train"]["output_dir"]}
        case.broken(at, values)
        return recipe(case.model, **values)

    return make


def test_the_corpus_has_cases_of_every_kind() -> None:
    assert len(CORPUS) >= 250
    assert len({case.broken for case in CORPUS.values()}) == len(CORPUS)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", CORPUS)
def test_broken_input_ends_in_one_sentence_that_names_it(
    broken: Callable[[Case], dict[str, Any]], tmp_path: Path, name: str
) -> None:
    case = CORPUS[name]
    values = broken(case)
    output = Path(values["train"]["output_dir"])
    before = left(output)
    with pytest.raises(VlmtuneError) as caught:
        finetune(values)
    told = str(caught.value)
    assert isinstance(caught.value, case.error)
    assert case.said.replace("{at}", str(tmp_path / "rows")).replace("{out}", str(output)) in told
    sentence, *named = told.splitlines()
    assert len(sentence) < 700
    assert len(named) <= 6  # rows or mistakes, each in a line of its own
    assert "Traceback" not in told
    assert left(output) == before


def left(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.rglob("*"))
    except (OSError, ValueError):
        return []


CASES_OF_THE_COMMAND_LINE = (
    "row: the answer is empty",
    "picture: half a JPEG",
    "file: CSV with a cell too many",
    "template: a syntax error",
    "recipe: odd options of an optimiser",
    "model: half the weights",
    "output: earlier work",
)


@pytest.mark.parametrize("name", CASES_OF_THE_COMMAND_LINE)
def test_the_command_line_ends_with_code_2_and_no_traceback(
    broken: Callable[[Case], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    case = CORPUS[name]
    values = broken(case)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(sys, "argv", ["vlmtune", str(tmp_path / "recipe.yaml")])
    monkeypatch.delitem(sys.modules, "vlmtune.run", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("vlmtune.run", run_name="__main__")  # as python -m does it
    said = capfd.readouterr()
    assert ended.value.code == 2
    assert "error: " in said.err
    assert case.said.replace("{at}", str(tmp_path / "rows")).replace("{out}", values["train"]["output_dir"]) in said.err
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [\n", "is not valid YAML"),
        ("model: {name: a}\n  data: 5", "is not valid YAML"),
        ("\t- a", "is not valid YAML"),
        ("", "`model` is missing"),
        ("- a\n- b", "holds no recipe"),
        ("42", "holds no recipe"),
        ("model: {name: a}", "`data` is missing"),
        ("model: {name: a}\ndata: {source: b}\ntrain: {learnin_rate: 1}", "line 3: `train.learnin_rate`"),
    ],
)
def test_a_recipe_s_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        finetune(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_recipe_that_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: {name: \xe4}")
    for path, said in (
        ("none.yaml", "does not exist"),
        (tmp_path, "cannot be read"),
        (tmp_path / "latin.yaml", "cannot be read"),
    ):
        with pytest.raises(RecipeError, match=said):
            finetune(path)


def test_nothing_can_be_resumed_where_there_is_no_checkpoint(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        finetune(recipe(), resume=True)
    assert str(caught.value) == f"there is nothing to resume: {tmp_path}/run holds no whole checkpoint"
    assert not (tmp_path / "run").exists()


def test_cells_of_a_table_are_the_texts_that_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('code,name,note\n007,NA,"a, b\nc"\n1.50,None,\n')
    rows = load_data(DataSection(source=str(tmp_path / "a.csv"), prompt="{code} {name}", response="{note}")).train
    assert rows.raw(0) == {"code": "007", "name": "NA", "note": "a, b\nc"}
    assert rows.raw(1) == {"code": "1.50", "name": "None", "note": None}


def test_an_earlier_run_stays_until_nothing_is_left_to_be_refused(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in (".vlmtune", "adapter_model.safetensors"):
        (tmp_path / "run" / name).write_text("")
    with pytest.raises(RecipeError, match="offline mode"):  # the last that can be refused: the trainer says it
        finetune(recipe(**{"train.push_to_hub": True}), overwrite=True)
    assert left(tmp_path / "run") == [".vlmtune", "adapter_model.safetensors"]
