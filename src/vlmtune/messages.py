"""A row of any data set becomes messages: the only file that knows how people write down their data.

    row ── RowFormat.read ──> loose turns ── format_messages ──> messages

A format says where the turns of a row are; ours are at the end of this file, a few lines each. What is true of every
format happens once, in `format_messages`: names of roles, kinds of parts, pictures that go to their places, order of
turns. A picture stays what it was (PIL image, path, URL, data URL or bytes); nothing is opened here.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmtune import plugins
from vlmtune.errors import DatasetError

Row = Mapping[str, Any]
Message = dict[str, Any]
Part = dict[str, Any]

SYNONYMS = {"developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", **SYNONYMS}
FOLLOWS = {"user": ("assistant",), "assistant": ("user",), "calls": ("tool",), "tool": ("tool", "assistant")}
REASONING = ("reasoning_content", "reasoning", "thinking")  # chat templates read the first of these names
REASONING_PARTS = ("reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
# where a picture stands in a part or in a datasets `Image` dict; bytes first, for then the path is only a name
IMAGE_KEYS = ("bytes", "image", "image_url", "url", "path", "base64")
IMAGE_COLUMNS = ("images", "image")

# LLaVA writes "<image>\nWhat is this?": one newline belongs to the placeholder, the one after it or else the one before
PLACEHOLDER = re.compile(r"<image>\n|\n<image>(?!\n)|<image>")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one, and no tokenizer can read it
TEMPLATE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Templates(NamedTuple):
    """The texts that a row's columns are filled into."""

    prompt: str | None
    response: str | None


@dataclass(frozen=True)
class RowFormat:
    """One way to write down a row.

    `read(row, templates)` returns the turns, `{"role": ..., "content": ...}`, loosely: any role that `ROLES` knows, a
    content that is text or a list of parts, `{"type": "image"}` for the row's next picture. It leaves the checks to
    `format_messages`, which has seen to it that the columns are there.
    """

    name: str
    read: Callable[[Row, Templates], Sequence[Any]]
    columns: tuple[str, ...] = ()  # a row of this format has them: `auto` goes by that
    answer: str | None = None  # one more, which may be missing where no answer is wanted
    # `<image>` in a user's text stands for a picture, and every picture has one; None: where a row with pictures has it
    marked: bool | None = False
    templated: bool = False  # made from prompt= and response=
    tools: str | None = None  # the column of the tools that the assistant may call, where a row has it

    def wanted(self, prompt_only: bool) -> tuple[str, ...]:
        return self.columns if prompt_only or self.answer is None else (*self.columns, self.answer)

    def matches(self, row: Row, prompt_only: bool) -> bool:
        wanted = self.wanted(prompt_only)
        return bool(wanted) and not any(_is_null(row.get(column)) for column in wanted)


def format_messages(
    row: Row,
    *,
    format: str | RowFormat = "auto",
    system: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    images: str | Sequence[str] | None = None,
    prompt_only: bool = False,
) -> list[Message]:
    """The conversation in a row, as messages in the shape of OpenAI and transformers.

    Every content is a list of typed parts: `{"type": "text", "text": str}`, `{"type": "image", "image": picture}` (PIL
    image, path, URL, data URL or bytes) and `{"type": "video", ...}` as it came. An optional system message comes
    first, then user and assistant take turns; the user begins and the assistant has the last word. An assistant's message
    may have `tool_calls` and `reasoning_content`, messages of the role `tool` follow upon calls, and the row's `tools` are
    those of the first message.

    - `format`: `columns`, `openai`, `sharegpt`, `alpaca`, `prompt_completion`, the name of an entry point in
      `vlmtune.formats`, a `RowFormat`, or `auto`: `columns` where a template is given, else told from the columns.
    - `prompt`, `response`: the templates of `columns`; `{name}` is replaced by that column's text.
    - `system`: a template too, in every format, for rows that bring no system message of their own.
    - `images`: a column of pictures or several; None takes `images` or `image` where the row has it, `[]` takes none.
    - `prompt_only`: without the last answer, which need not be there: what a model is asked.

    The row is not changed. Raises `DatasetError`, one sentence that says what was found and what was wanted.

    >>> format_messages({"Product Name": "Kite", "image": "kite.jpg", "text": "It flies."},
    ...                 prompt="Describe {Product Name}.", response="{text}")
    [{'role': 'user', 'content': [{'type': 'image', 'image': 'kite.jpg'}, {'type': 'text', 'text': 'Describe Kite.'}]},
     {'role': 'assistant', 'content': [{'type': 'text', 'text': 'It flies.'}]}]
    """
    if not isinstance(row, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  (a notebook passes anything)
        raise DatasetError(f"a row is a mapping of columns to values, found {_kind(row)}.")
    templates = Templates(prompt, None if prompt_only else response)
    chosen = _choose(row, format, prompt is not None or response is not None, prompt_only)
    try:
        _check_columns(row, chosen, templates, prompt_only)
        turns = [_turn(turn, number) for number, turn in enumerate(chosen.read(row, templates), 1)]
        _check_order(turns, prompt_only)
        if prompt_only and turns[-1]["role"] == "assistant":
            turns.pop()
        pictures = _row_pictures(row, images)
        marked = _has_marks(turns, pictures) if chosen.marked is None else chosen.marked
        messages = [_message(turn, number, marked) for number, turn in enumerate(turns, 1)]
        _place_pictures(messages, pictures, marked=marked)
        _check_contents(messages)
        messages = _with_system(messages, "" if system is None else _fill(system, row))
        tools = _tools(row.get(chosen.tools), chosen.tools) if chosen.tools else []
        return [{**messages[0], "tools": tools}, *messages[1:]] if tools else messages
    except DatasetError as error:
        raise DatasetError(f"format {chosen.name!r}: {error}") from None
    except RecursionError:
        raise DatasetError(f"format {chosen.name!r}: lists or mappings of the row hold each other hundreds deep.") from None


# ---- the choice of a format


def _choose(row: Row, format: str | RowFormat, has_template: bool, prompt_only: bool) -> RowFormat:
    if isinstance(format, RowFormat):
        return format
    if format != "auto":
        return _named(format)
    if has_template:
        return COLUMNS
    formats = list(FORMATS.values())
    found = [each for each in formats if each.matches(row, prompt_only=False)]
    if not found:  # only then are other packages imported
        formats += [_named(name) for name in plugins.names(plugins.FORMATS) if name not in FORMATS]
        found = [each for each in formats if each.matches(row, prompt_only)]
    if len(found) == 1:
        return found[0]
    if found:
        several = " and ".join(each.name for each in found)
        raise DatasetError(f"format 'auto': the row fits {several}, say which with format=; {_columns_of(row)}.")
    wants = [f"{each.name} wants {', '.join(each.wanted(prompt_only))}" for each in formats if each.columns]
    raise DatasetError(f"format 'auto': {_columns_of(row)}; {'; '.join(wants)}; columns wants prompt= and response=.")


def _named(name: str) -> RowFormat:
    if name in FORMATS:
        return FORMATS[name]
    known = sorted({"auto", *FORMATS, *plugins.names(plugins.FORMATS)})
    if name not in known:
        raise DatasetError(f"no format {name!r}, there is {', '.join(known)}.{plugins.did_you_mean(name, known)}")
    found = plugins.load(plugins.FORMATS, name)
    if not isinstance(found, RowFormat):
        raise DatasetError(f"format {name!r}: its entry point is {_kind(found)}, wanted a RowFormat.")
    return found


def _check_columns(row: Row, chosen: RowFormat, templates: Templates, prompt_only: bool) -> None:
    if chosen.templated and (templates.prompt is None or (templates.response is None and not prompt_only)):
        missing = "prompt" if templates.prompt is None else "response"
        raise DatasetError(f"{missing}= is not given, wanted a template such as '{{name of a column}}'.")
    if not chosen.templated and templates != (None, None):
        raise DatasetError("prompt= and response= are given, but this format's texts stand in the row itself.")
    for column in chosen.wanted(prompt_only):
        if _is_null(_column(row, column)):
            raise DatasetError(f"column {column!r} is null; {_columns_of(row)}.")


# ---- turns and parts


def _turn(turn: Any, number: int) -> Message:
    """A turn under its role's own name; its content as it came."""
    if not isinstance(turn, Mapping):
        raise DatasetError(f"turn {number} is {_kind(turn)}, wanted a mapping with a role and a content.")
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise DatasetError(f"turn {number} has the role {_short(role)}, wanted system, user, assistant or tool.")
    role = ROLES[role]
    return {"role": role, "content": turn.get("content"), **_beside(turn, role, f"turn {number} ({role})")}


def _check_order(turns: Sequence[Message], prompt_only: bool) -> None:
    roles = [turn["role"] for turn in turns]
    first = int(roles[:1] == ["system"])
    if not roles[first:]:
        raise DatasetError("there is no user's turn, wanted a user's and an assistant's.")
    wanted: tuple[str, ...] = ("user",)
    calls: list[dict[str, Any]] = []
    for number, turn in enumerate(turns[first:], first + 1):
        role = turn["role"]
        if role not in wanted:
            hint = {
                "system": " (a system message comes first or not at all)",
                "tool": " (a tool's result follows upon tool_calls)",
            }.get(role, "")
            raise DatasetError(f"turn {number} is the {role}'s, wanted {_either(wanted)}{hint}.")
        calls = turn.get("tool_calls", calls)
        known = [call.get("id") for call in calls]
        if role == "tool" and None not in known and turn.get("tool_call_id", known[0]) not in known:
            raise DatasetError(f"turn {number} (tool) answers the call {turn['tool_call_id']!r}, which nobody made.")
        wanted = FOLLOWS["calls" if "tool_calls" in turn else role]
    if roles[-1] != "assistant" and not prompt_only:
        raise DatasetError(f"the last turn is the {roles[-1]}'s, wanted the assistant's: it is what is learnt.")


def _has_marks(turns: Sequence[Message], pictures: Sequence[Any]) -> bool:
    """Whether plain texts say where the row's pictures stand, as LLaMA-Factory and ms-swift write messages."""
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    return bool(pictures) and all(isinstance(text, str) for text in asked) and any("<image>" in text for text in asked)


def _message(turn: Message, number: int, marked: bool) -> Message:
    role, content, where = turn["role"], turn["content"], f"turn {number} ({turn['role']})"
    reasoning: list[str] = []
    while role == "assistant" and _is_list(content) and content and (said := _reasoning(content[0], where)) is not None:
        reasoning, content = [*reasoning, said], content[1:]
    if reasoning and "reasoning_content" in turn:
        raise DatasetError(f"{where} has its reasoning twice, beside the content and in it.")
    if content is None:
        parts: list[Part] = []  # refused later, with the other empty ones
    elif isinstance(content, str):
        parts = _split(content) if marked and role == "user" else [{"type": "text", "text": content}]
    elif _is_list(content):
        parts = [_part(part, f"a part of {where}") for part in content]
    else:
        raise DatasetError(f"the content of {where} is {_kind(content)}, wanted text or a list of parts.")
    beside = {**turn, "reasoning_content": "\n".join(reasoning)} if any(reasoning) else turn
    return {**beside, "content": parts}


def _part(part: Any, where: str) -> Part:
    if not isinstance(part, Mapping):
        raise DatasetError(f"{where} is {_kind(part)}, wanted a mapping with a type.")
    kind, text = part.get("type"), part.get("text")
    if kind in TEXT_PARTS:
        if not isinstance(text, str):
            raise DatasetError(f"{where} has {_kind(text)} as its text, wanted text.")
        return {"type": "text", "text": text}
    if kind in IMAGE_PARTS:
        found = list(_pictures({key: part.get(key) for key in IMAGE_KEYS}, where))
        if len(found) > 1:
            raise DatasetError(f"{where} has {len(found)} pictures, wanted one; each has a part of its own.")
        return {"type": "image", "image": found[0]} if found else {"type": "image"}
    if kind == "video":
        return {key: _copy(value) for key, value in part.items() if value is not None}
    wanted = ", ".join((*TEXT_PARTS, *IMAGE_PARTS))
    raise DatasetError(f"{where} has the type {_short(kind)}, wanted {wanted} or video.")


def _split(text: str) -> list[Part]:
    """Text with `<image>` as parts: 'A<image>B' is text, an open place for a picture, text."""
    first, *others = PLACEHOLDER.split(text)
    parts: list[Part] = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image"}, {"type": "text", "text": other}]
    return parts


def _check_contents(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, 1):
        may_be_empty = message["role"] in ("system", "tool") or "tool_calls" in message
        if not may_be_empty and not _says_something(message, in_words=message["role"] == "assistant"):
            what = "the answer" if message["role"] == "assistant" else "the user's text"
            raise DatasetError(f"{what} is empty in turn {number}.")
        message["content"] = [part for part in message["content"] if part.get("text") != ""]
        if any(part["type"] == "text" and LONE_SURROGATE.search(part["text"]) for part in message["content"]):
            raise DatasetError(f"the text of turn {number} holds half of a UTF-16 pair, which is no character.")


def _says_something(message: Message, *, in_words: bool = False) -> bool:
    """Whether there is a text that is not blank or, unless `in_words`, a picture."""
    return any(part["text"].strip() if part["type"] == "text" else not in_words for part in message["content"])


def _with_system(messages: list[Message], default: str) -> list[Message]:
    """The messages with the default for a system message that is missing or blank; a blank default is none."""
    if messages[0]["role"] == "system":
        if _says_something(messages[0]):
            return messages
        messages = messages[1:]
    if not default.strip():
        return messages
    return [{"role": "system", "content": [{"type": "text", "text": default}]}, *messages]


# ---- tools and reasoning


def _beside(turn: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """What a turn has beside its content, under the names that chat templates read."""
    names = (*REASONING, "tool_calls", "function_call", "tool_call_id", "name")
    given = {name: turn[name] for name in names if turn.get(name) and not _is_null(turn[name])}
    if "function_call" in given:
        raise DatasetError(f"{where} has 'function_call', which is the older way to write them, wanted 'tool_calls'.")
    for name in (*REASONING, "tool_calls"):
        if name in given and role != "assistant":
            raise DatasetError(f"{where} has {name!r}, which only the assistant's turns have.")
    found: dict[str, Any] = {}
    if (reasoning := next((name for name in REASONING if name in given), None)) is not None:
        found["reasoning_content"] = _words(given[reasoning], f"the {reasoning} of {where}")
    if "tool_calls" in given:
        calls = given["tool_calls"]
        if not _is_list(calls):
            raise DatasetError(f"the tool_calls of {where} are {_kind(calls)}, wanted a list.")
        found["tool_calls"] = [_call(call, f"call {number} of {where}") for number, call in enumerate(calls, 1)]
    if role == "tool":
        found |= {key: _words(given[key], f"the {key} of {where}") for key in ("tool_call_id", "name") if key in given}
    return found


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call as OpenAI writes it, but with its arguments as an object: that is what chat templates want."""
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise DatasetError(f"{where} names no function, wanted {{'function': {{'name': ..., 'arguments': {{...}}}}}}.")
    arguments = _object(function.get("arguments"), f"the arguments of {where}")
    if not isinstance(arguments, dict):
        raise DatasetError(f"the arguments of {where} are {_kind(arguments)}, wanted an object.")
    own = {} if _is_null(call.get("id")) else {"id": _words(call["id"], f"the id of {where}")}
    return {"type": "function", **own, "function": {"name": _words(name, where), "arguments": arguments}}


def _tools(value: Any, column: str) -> list[Any]:
    """The schemas in a row's column of tools."""
    tools = _object(value, f"column {column!r}") or []
    if not _is_list(tools):
        raise DatasetError(f"column {column!r} holds {_kind(tools)}, wanted a list of tools.")
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DatasetError(f"tool {number} in column {column!r} has no name, wanted {{'function': {{'name': ...}}}}.")
    return tools


def _reasoning(part: Any, where: str) -> str | None:
    """The text of a part that holds reasoning; None of another part."""
    if not isinstance(part, Mapping) or part.get("type") not in REASONING_PARTS:
        return None
    text = next((part[key] for key in (*REASONING, "text") if not _is_null(part.get(key))), None)
    return _words(text, f"the {part['type']} of {where}")


def _words(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"{where} is {_kind(value)}, wanted text.")
    return _json(value, where)


def _object(value: Any, where: str) -> Any:
    """A copy of an object, or of what a JSON text says; an empty one for null and blank text."""
    if _is_null(value) or (isinstance(value, str) and not value.strip()):
        return {}
    try:
        return _json(json.loads(value), where, nulls=True) if isinstance(value, str) else _json(value, where)
    except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, thousands of brackets
        raise DatasetError(f"{where} cannot be read as JSON: {error}.") from None


def _json(value: Any, where: str, *, nulls: bool = False) -> Any:
    """A copy of what JSON can write. Without `nulls` keys that are null, as Arrow fills them in, are left out."""
    if isinstance(value, Mapping):
        kept = {key: each for key, each in value.items() if nulls or not _is_null(each)}
        return {_json(key, where): _json(each, where, nulls=nulls) for key, each in kept.items()}
    if _is_list(value):
        return [_json(each, where, nulls=nulls) for each in value]
    if isinstance(value, str) and LONE_SURROGATE.search(value):
        raise DatasetError(f"{where} holds half of a UTF-16 pair, which is no character.")
    if not (value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))):
        raise DatasetError(f"{where} holds {_short(value)}, which JSON cannot write.")
    return value


# ---- pictures


def _row_pictures(row: Row, images: str | Sequence[str] | None) -> list[Any]:
    if images is None:
        images = [column for column in IMAGE_COLUMNS if list(_pictures(row.get(column), f"column {column!r}"))]
        if len(images) > 1:
            raise DatasetError("columns 'images' and 'image' both hold pictures, say which with images=.")
    columns = [images] if isinstance(images, str) else images
    return [picture for column in columns for picture in _pictures(_column(row, column), f"column {column!r}")]


def _pictures(value: Any, where: str) -> Iterator[Any]:
    """The pictures in a value of any shape, in order; none in null and in empty text."""
    if _is_null(value):
        return
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, bytes | bytearray):
        yield bytes(value)
    elif isinstance(value, os.PathLike):
        yield os.fspath(value)
    elif isinstance(value, Mapping):
        key = next((key for key in IMAGE_KEYS if not _is_null(value.get(key))), "image")
        if key not in value and not all(_is_null(each) for each in value.values()):
            raise DatasetError(f"{where} holds a mapping without a picture, wanted one of {', '.join(IMAGE_KEYS)} in it.")
        found = value.get(key)
        bare = key == "base64" and isinstance(found, str) and not found.startswith("data:")
        yield from _pictures(f"data:image/*;base64,{found}" if bare else found, where)
    elif _is_list(value):
        for each in value:
            yield from _pictures(each, where)
    elif _is_pil(value):
        yield value
    else:
        raise DatasetError(f"{where} holds {_kind(value)}, wanted a PIL image, path, URL, data URL or bytes.")


def _place_pictures(messages: Sequence[Message], pictures: Sequence[Any], *, marked: bool) -> None:
    """Fill the open places with the row's pictures, in order; without any place they open the first user's turn."""
    images = [part for message in messages for part in message["content"] if part["type"] == "image"]
    places = [part for part in images if "image" not in part]
    if not images and not marked:
        first = next(message for message in messages if message["role"] == "user")
        places = [{"type": "image"} for _ in pictures]
        first["content"][:0] = places
    if len(places) != len(pictures):
        hint = "; the turns have their own, images=[] leaves the row's alone" if images and not places else ""
        raise DatasetError(f"{len(places)} <image> placeholders, {len(pictures)} pictures, wanted one for each{hint}.")
    for place, picture in zip(places, pictures, strict=True):
        place["image"] = picture


# ---- templates and values


def _fill(template: str, row: Row, *, required: bool = False) -> str:
    """The template with each `{name}` replaced by that column's text; null is no text, an error where required."""
    if template in row:
        raise DatasetError(f"the template {template!r} is a column's name, wanted '{{{template}}}' for its text.")

    def text(match: re.Match[str]) -> str:
        found, name = match[0], match[1]
        if found in ("{{", "}}"):
            return found[0]
        if name is None:
            raise DatasetError(f"the template has a lone {found!r}, wanted {found * 2!r} for a brace that stays.")
        value = _column(row, name, hint="; braces that stay are doubled")
        if not (_is_null(value) or isinstance(value, str | int | float)):
            raise DatasetError(f"column {name!r} holds {_kind(value)}, wanted text or a number for the template.")
        filled = "" if _is_null(value) else str(value)
        if required and not filled.strip():
            raise DatasetError(f"the answer is empty: column {name!r} is {'blank' if value is filled else 'null'}.")
        return filled

    return TEMPLATE.sub(text, template)


def _column(row: Row, name: str, hint: str = "") -> Any:
    if name not in row:
        near = plugins.did_you_mean(name, map(str, row))
        raise DatasetError(f"column {name!r} is missing; {_columns_of(row)}{hint}.{near}")
    return row[name]


def _columns_of(row: Row) -> str:
    names = [f"{name} (null)" if _is_null(value) else str(name) for name, value in row.items()]
    return f"the row has {', '.join(names) or 'no columns'}"


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas writes NaN for null


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_pil(value: Any) -> bool:
    from PIL import Image  # here, for only a value that is nothing else needs Pillow

    return isinstance(value, Image.Image)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if _is_list(value) else value


def _kind(value: Any) -> str:
    return "null" if _is_null(value) else f"a value of type {type(value).__name__}"


def _either(roles: Sequence[str]) -> str:
    return " or ".join(f"the {role}'s" for role in roles)


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."


# ---- the formats


def _turns(row: Row, column: str) -> list[Any]:
    """The turns in a column, `from` and `value` under the names `role` and `content`."""
    if not _is_list(row[column]):
        raise DatasetError(f"column {column!r} holds {_kind(row[column])}, wanted a list of turns.")
    return [_renamed(turn) if isinstance(turn, Mapping) else turn for turn in row[column]]


def _renamed(turn: Mapping[str, Any]) -> Message:
    named = {"role": turn.get("from"), "content": turn.get("value")}
    return named | {key: value for key, value in turn.items() if value is not None}


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not (_is_null(value) or isinstance(value, str)):
        raise DatasetError(f"column {column!r} holds {_kind(value)}, wanted text.")
    return value if isinstance(value, str) else ""


def _read_columns(row: Row, templates: Templates) -> list[Message]:
    parts = _split(templates.prompt or "")  # before the filling: a column's text cannot make a place for a picture
    user = [{**part, "text": _fill(part["text"], row)} if "text" in part else part for part in parts]
    turns: list[Message] = [{"role": "user", "content": user}]
    if templates.response is not None:
        turns.append({"role": "assistant", "content": _fill(templates.response, row, required=True)})
    return turns


def _read_alpaca(row: Row, templates: Templates) -> list[Message]:
    task, extra = _text(row, "instruction"), _text(row, "input")
    question = ALPACA_WITH_INPUT.format(task, extra) if extra else ALPACA_WITHOUT_INPUT.format(task)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row.get("output")}]


def _read_prompt_completion(row: Row, templates: Templates) -> list[Any]:
    turns: list[Any] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(column)
        if isinstance(value, str):
            turns.append({"role": role, "content": value})
        elif not _is_null(value):
            turns += _turns(row, column)
    return turns


# Stanford Alpaca's two prompts, letter by letter: https://github.com/tatsu-lab/stanford_alpaca#data-release
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)

COLUMNS = RowFormat("columns", _read_columns, templated=True)
OPENAI = RowFormat("openai", lambda row, _: _turns(row, "messages"), ("messages",), marked=None, tools="tools")
SHAREGPT = RowFormat("sharegpt", lambda row, _: _turns(row, "conversations"), ("conversations",), marked=True, tools="tools")
ALPACA = RowFormat("alpaca", _read_alpaca, ("instruction",), answer="output")
PROMPT_COMPLETION = RowFormat(
    "prompt_completion", _read_prompt_completion, ("prompt",), answer="completion", marked=None, tools="tools"
)
FORMATS = {each.name: each for each in (COLUMNS, OPENAI, SHAREGPT, ALPACA, PROMPT_COMPLETION)}
