import copy
import doctest
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtune import messages as messages_module
from vlmtune import plugins
from vlmtune.errors import DatasetError
from vlmtune.messages import ALPACA, COLUMNS, FORMATS, OPENAI, PROMPT_COMPLETION, SHAREGPT, RowFormat, format_messages

KITE = {"Product Name": "Kite", "Price (€)": 12, "image": "kite.jpg", "text": "It flies."}


def text(value):
    return {"type": "text", "text": value}


def image(value):
    return {"type": "image", "image": value}


def user(*parts):
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def assistant(value):
    return {"role": "assistant", "content": [text(value)]}


def system(value):
    return {"role": "system", "content": [text(value)]}


def openai(*contents):
    """A row whose turns, user and assistant by turns, have these contents."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


def sharegpt(question, **columns):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]
    return {"conversations": turns, **columns}


def error(row, **options):
    with pytest.raises(DatasetError) as caught:
        format_messages(row, **options)
    message = str(caught.value)
    assert message.startswith("format ")
    assert "\n" not in message
    return message


# ---- columns


def test_templates_are_filled_with_columns_whose_names_have_spaces_and_punctuation():
    messages = format_messages(
        KITE, system="You sell.", prompt="{Product Name}, {Price (€)} euros", response="{text}", images="image"
    )
    assert messages == [system("You sell."), user(image("kite.jpg"), "Kite, 12 euros"), assistant("It flies.")]


def test_a_placeholder_in_the_prompt_template_places_the_picture():
    messages = format_messages(KITE, prompt="Describe {Product Name}\n<image>", response="{text}")
    assert messages[0] == user("Describe Kite", image("kite.jpg"))


def test_pictures_of_several_columns_come_in_the_order_in_which_the_columns_are_named():
    row = {"front": "f.png", "sides": ["l.png", "r.png"], "back": None, "text": "A box."}
    messages = format_messages(row, prompt="What?", response="{text}", images=["sides", "back", "front"])
    assert messages[0] == user(image("l.png"), image("r.png"), image("f.png"), "What?")


def test_a_placeholder_in_a_column_stays_text():
    messages = format_messages({"q": "Is <image> a tag?", "a": "Yes."}, prompt="{q}", response="{a}")
    assert messages[0] == user("Is <image> a tag?")


def test_braces_in_a_column_stay_and_doubled_braces_of_a_template_become_single():
    messages = format_messages({"q": "{x}", "a": "Yes."}, prompt='{{"q": {q}}}', response="{a}")
    assert messages[0] == user('{"q": {x}}')


def test_null_in_a_prompt_column_is_no_text():
    messages = format_messages({"q": None, "a": "Yes."}, prompt="Category: {q}", response="{a}")
    assert messages[0] == user("Category: ")


def test_a_misspelt_column_is_named_with_the_columns_there_are_and_the_nearest():
    message = error(KITE, prompt="{Product Nam}", response="{text}")
    assert message == (
        "format 'columns': column 'Product Nam' is missing; the row has Product Name, Price (€), image, text; "
        "braces that stay are doubled. Did you mean 'Product Name'?"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": "?"}, "response= is not given"),
        ({"response": "{text}"}, "prompt= is not given"),
        ({"prompt": "?", "response": "text"}, "'text' is a column's name, wanted '{text}'"),
        ({"prompt": "a } b", "response": "{text}"}, "lone '}', wanted '}}'"),
        ({"prompt": "?", "response": "{null}"}, "the answer is empty: column 'null' is null"),
        ({"prompt": "?", "response": "{blank}"}, "the answer is empty: column 'blank' is blank"),
        ({"prompt": "?", "response": "{list}"}, "column 'list' holds a value of type list"),
        ({"prompt": "?", "response": "{text}", "images": "picture"}, "column 'picture' is missing"),
        ({"prompt": "?", "response": "{text}", "images": "number"}, "column 'number' holds a value of type int"),
        ({"prompt": "<image><image>", "response": "{text}"}, "2 <image> placeholders, 1 pictures"),
    ],
)
def test_a_template_that_does_not_fit_the_row_is_refused(options, sentence):
    row = {"text": "It flies.", "image": "a.png", "null": None, "blank": " ", "list": [], "number": 3}
    assert sentence in error(row, **options)


# ---- openai


def test_text_content_becomes_one_text_part():
    assert format_messages(openai("Hi", "Hello", "Bye", "Ciao")) == [
        user("Hi"),
        assistant("Hello"),
        user("Bye"),
        assistant("Ciao"),
    ]


@pytest.mark.parametrize(
    ("part", "picture"),
    [
        ({"type": "image_url", "image_url": "http://a/b.png"}, "http://a/b.png"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
         "data:image/png;base64,AA=="),
        ({"type": "input_image", "image_url": "http://a/b.png"}, "http://a/b.png"),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "url": "http://a/b.png"}, "http://a/b.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "base64": "AA=="}, "data:image/*;base64,AA=="),
        ({"type": "image", "image": {"bytes": b"PNG", "path": "a.png"}}, b"PNG"),
    ],
)  # fmt: skip
def test_every_way_to_write_an_image_part_gives_the_picture(part, picture):
    row = openai([part, {"type": "input_text", "text": "What?"}], "A box.")
    assert format_messages(row) == [user(image(picture), "What?"), assistant("A box.")]


def test_image_parts_without_a_picture_take_those_of_the_column_in_order():
    row = openai([{"type": "image"}, text("or"), {"type": "image"}, text("?")], "Left.") | {"images": ["l.png", "r.png"]}
    assert format_messages(row)[0] == user(image("l.png"), "or", image("r.png"), "?")


def test_a_column_of_pictures_that_no_part_waits_for_opens_the_first_user_turn():
    assert format_messages(openai("What?", "A box.") | {"image": "a.png"})[0] == user(image("a.png"), "What?")


def test_keys_that_arrow_fills_with_null_are_as_good_as_missing():
    parts = [
        {"type": "image", "text": None, "image": None, "image_url": None},
        {"type": "text", "text": "What?", "image": None, "image_url": None},
    ]
    row = openai(parts, "A box.") | {"images": ["a.png"], "conversations": None, "prompt": None, "completion": None}
    assert format_messages(row) == [user(image("a.png"), "What?"), assistant("A box.")]


def test_a_video_part_passes_through():
    video = {"type": "video", "video": ["1.png", "2.png"], "fps": 2}
    assert format_messages(openai([video | {"path": None}, text("What?")], "A cat."))[0] == user(video, "What?")


def test_a_developer_message_is_the_system_message():
    row = openai("Hi", "Hello")
    row["messages"].insert(0, {"role": "developer", "content": "Be brief."})
    assert format_messages(row) == [system("Be brief."), user("Hi"), assistant("Hello")]


def test_pictures_in_the_turns_and_in_the_column_are_refused_until_one_is_left_out():
    row = openai([image("a.png")], "A box.") | {"image": "b.png"}
    assert "0 <image> placeholders, 1 pictures" in error(row)
    assert "images=[]" in error(row)
    assert format_messages(row, images=[])[0] == user(image("a.png"))


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("Hi", "column 'messages' holds a value of type str, wanted a list of turns"),
        ([], "there is no user's turn"),
        (["Hi"], "turn 1 is a value of type str"),
        ([{"role": "user"}], "the last turn is the user's, wanted the assistant's"),
        ([{"role": "assistant", "content": "Hi"}], "turn 1 is the assistant's, wanted the user's"),
        ([{"role": "user", "content": "a"}] * 2, "turn 2 is the user's, wanted the assistant's"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "a system message comes first"),
        ([{"role": "tool", "content": "a"}], "turn 1 is the tool's, wanted the user's (a tool's result follows upon"),
        ([{"content": "a"}], "turn 1 has the role None"),
        ([{"role": ["user"], "content": "a"}], "turn 1 has the role ['user']"),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], "has 'tool_calls', which only the assistant's turns have"),
    ],
)
def test_turns_out_of_order_are_refused(messages, sentence):
    assert sentence in error({"messages": messages}, format="openai")


@pytest.mark.parametrize(
    ("question", "answer", "sentence"),
    [
        (5, "Yes.", "the content of turn 1 (user) is a value of type int"),
        ("Hi", None, "the answer is empty in turn 2"),
        ("Hi", " \n", "the answer is empty in turn 2"),
        ("Hi", [], "the answer is empty in turn 2"),
        ("", "Yes.", "the user's text is empty in turn 1"),
        (["Hi"], "Yes.", "a part of turn 1 (user) is a value of type str"),
        ([{"text": "Hi"}], "Yes.", "a part of turn 1 (user) has the type None"),
        ([{"type": "audio"}], "Yes.", "has the type 'audio'"),
        ([{"type": "text", "text": 5}], "Yes.", "has a value of type int as its text"),
        ([{"type": "image", "image": ["a", "b"]}], "Yes.", "has 2 pictures, wanted one"),
        ([{"type": "image", "image": 5}], "Yes.", "holds a value of type int, wanted a PIL image, path"),
        ([{"type": "image"}], "Yes.", "1 <image> placeholders, 0 pictures"),
    ],
)
def test_a_content_that_cannot_be_read_is_refused(question, answer, sentence):
    assert sentence in error(openai(question, answer))


# ---- sharegpt


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        ("<image>\nA box?", [image("1"), "A box?"]),
        ("A box?\n<image>", ["A box?", image("1")]),
        ("Is\n<image>\na box?", ["Is\n", image("1"), "a box?"]),
        ("Is <image> a box?", ["Is ", image("1"), " a box?"]),
        ("<image>\n\nA box?", [image("1"), "\nA box?"]),
        ("<image>", [image("1")]),
    ],
)
def test_a_picture_takes_the_place_of_its_placeholder_and_of_one_newline(question, parts):
    assert format_messages(sharegpt(question, image="1")) == [user(*parts), assistant("Yes.")]


def test_placeholders_of_several_turns_take_the_pictures_in_order():
    row = sharegpt("<image><image>\nSame?", images=["1", "2", "3"])
    row["conversations"] += [{"role": "user", "content": "And <image>?"}, {"role": "assistant", "content": "No."}]
    messages = format_messages(row)
    assert messages[0] == user(image("1"), image("2"), "Same?")
    assert messages[2] == user("And ", image("3"), "?")


def test_a_placeholder_in_an_answer_stays_text():
    row = sharegpt("How do I write a picture?")
    row["conversations"][1]["value"] = "Write <image>."
    assert format_messages(row)[1] == assistant("Write <image>.")


@pytest.mark.parametrize(
    ("question", "pictures", "sentence"),
    [
        ("A box?", ["1"], "0 <image> placeholders, 1 pictures"),
        ("<image>", ["1", "2"], "1 <image> placeholders, 2 pictures"),
        ("<image><image>", ["1"], "2 <image> placeholders, 1 pictures"),
        ("<image>", None, "1 <image> placeholders, 0 pictures"),
    ],
)
def test_fewer_or_more_placeholders_than_pictures_are_refused(question, pictures, sentence):
    assert sentence in error(sharegpt(question, images=pictures))


# ---- alpaca, prompt_completion


def test_alpaca_with_an_input_reads_as_stanford_wrote_it():
    question = format_messages({"instruction": "Add.", "input": "1, 2", "output": "3"})[0]["content"][0]["text"]
    assert question == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    )


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}, {"input": float("nan")}])
def test_alpaca_without_an_input_leaves_it_out(extra):
    messages = format_messages({"instruction": "Say {hi}.", "output": "{hi}", **extra})
    assert messages[0]["content"][0]["text"] == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {hi}.\n\n### Response:\n"
    )
    assert messages[1] == assistant("{hi}")


def test_alpaca_rows_may_have_a_picture():
    row = {"instruction": "Describe.", "output": "A box.", "image": "a.png"}
    assert format_messages(row)[0]["content"][0] == image("a.png")


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_a_number_where_alpaca_wants_text_is_refused(column):
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", column: 3}
    assert "is a value of type int" in error(row) or f"column '{column}' holds a value of type int" in error(row)


def test_prompt_and_completion_may_be_text_or_turns():
    as_text = {"prompt": "Hi", "completion": "Hello", "image": "a.png"}
    as_turns = {
        "prompt": [{"role": "user", "content": [{"type": "image"}, text("Hi")]}],
        "completion": [{"role": "assistant", "content": "Hello"}],
        "image": "a.png",
    }
    assert format_messages(as_text) == format_messages(as_turns) == [user(image("a.png"), "Hi"), assistant("Hello")]


# ---- pictures of any kind

PICTURE = Image.new("RGB", (2, 1))


@pytest.mark.parametrize(
    ("value", "pictures"),
    [
        (PICTURE, [PICTURE]),
        ([PICTURE, "a.png"], [PICTURE, "a.png"]),
        (Path("a.png"), ["a.png"]),
        (b"PNG", [b"PNG"]),
        (b"", [b""]),
        ({"bytes": b"PNG", "path": "a.png"}, [b"PNG"]),
        ({"bytes": None, "path": "a.png"}, ["a.png"]),
        ({"bytes": None, "path": None}, []),
        ("http://a/b.png", ["http://a/b.png"]),
        ("", []),
        (None, []),
        (float("nan"), []),
        ([], []),
        ([None, "a.png"], ["a.png"]),
    ],
)
def test_a_column_may_hold_pictures_in_any_form(value, pictures):
    assert format_messages(openai("What?", "A box.") | {"image": value})[0] == user(*map(image, pictures), "What?")


def test_two_columns_of_pictures_are_refused_until_one_is_named():
    row = openai("What?", "A box.") | {"image": "a.png", "images": ["b.png"]}
    assert "say which with images=" in error(row)
    assert format_messages(row, images="image")[0] == user(image("a.png"), "What?")


# ---- system, prompt_only


def test_the_system_template_serves_every_format_and_yields_to_a_row_with_its_own():
    row = openai("Hi", "Hello") | {"tone": "rude"}
    assert format_messages(row, system="Be {tone}.")[0] == system("Be rude.")
    row["messages"].insert(0, {"role": "system", "content": "Be kind."})
    assert format_messages(row, system="Be {tone}.")[0] == system("Be kind.")


@pytest.mark.parametrize("blank", [None, "", " "])
def test_a_blank_system_message_is_none(blank):
    row = openai("Hi", "Hello") | {"note": blank}
    row["messages"].insert(0, {"role": "system", "content": blank})
    assert format_messages(row, system="{note}") == [user("Hi"), assistant("Hello")]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (openai("Hi", "Hello"), {}),
        (openai("Hi"), {}),
        (openai("Hi", None), {}),
        ({"prompt": "Hi"}, {}),
        ({"prompt": "Hi", "completion": "Hello"}, {}),
        ({"q": "Hi"}, {"prompt": "{q}", "response": "{answer}"}),
        ({"q": "Hi"}, {"prompt": "{q}"}),
    ],
)
def test_prompt_only_leaves_the_last_answer_out_and_needs_none(row, options):
    assert format_messages(row, prompt_only=True, **options) == [user("Hi")]


def test_prompt_only_keeps_the_earlier_answers():
    assert format_messages(openai("a", "b", "c", "d"), prompt_only=True) == [user("a"), assistant("b"), user("c")]


# ---- the choice of a format


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (openai("Hi", "Hello"), "openai"),
        (sharegpt("Hi"), "sharegpt"),
        ({"instruction": "Hi", "output": "Hello"}, "alpaca"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion"),
    ],
)
def test_auto_tells_the_format_from_the_columns(row, name):
    assert format_messages(row) == format_messages(row, format=name)


def test_auto_takes_the_templates_where_there_are_some():
    row = openai("Hi", "Hello") | {"q": "a", "a": "b"}
    assert format_messages(row, prompt="{q}", response="{a}") == [user("a"), assistant("b")]


def test_auto_says_what_it_found_and_what_each_format_wants():
    assert error({"question": "Hi", "messages": None}) == (
        "format 'auto': the row has question, messages (null); openai wants messages; sharegpt wants conversations; "
        "alpaca wants instruction, output; prompt_completion wants prompt, completion; "
        "columns wants prompt= and response=."
    )


def test_auto_refuses_a_row_that_fits_two_formats():
    row = openai("Hi", "Hello") | sharegpt("Hi")
    assert "the row fits openai and sharegpt, say which with format=" in error(row)


def test_an_unknown_format_is_named_with_the_nearest():
    with pytest.raises(DatasetError, match=r"no format 'share-gpt'.* Did you mean 'sharegpt'"):
        format_messages({}, format="share-gpt")


@pytest.mark.parametrize(
    ("format", "column"),
    [
        (OPENAI, "messages"),
        (SHAREGPT, "conversations"),
        (ALPACA, "instruction"),
        (PROMPT_COMPLETION, "prompt"),
    ],
)
def test_a_missing_or_null_column_is_named_with_the_format_and_the_columns_there_are(format, column):
    assert f"column {column!r} is missing; the row has text" in error({"text": "Hi"}, format=format.name)
    assert f"column {column!r} is null; the row has {column} (null)" in error({column: None}, format=format.name)


def test_templates_for_a_format_that_has_none_are_refused():
    assert "prompt= and response= are given" in error(openai("Hi", "Hello"), format="openai", prompt="{q}")


def test_a_row_that_is_no_mapping_is_refused():
    with pytest.raises(DatasetError, match="a row is a mapping of columns to values, found a value of type list"):
        format_messages([])


# ---- formats of others


def read_dialogue(row, templates):
    return [{"role": "human" if n % 2 == 0 else "model", "content": line} for n, line in enumerate(row["lines"])]


DIALOGUE = RowFormat("dialogue", read_dialogue, ("lines",), marked=True)


def test_a_format_is_passed_straight_in():
    row = {"lines": ["<image>\nWhat?", "A box."], "image": "a.png"}
    assert format_messages(row, format=DIALOGUE) == [user(image("a.png"), "What?"), assistant("A box.")]


@pytest.fixture
def installed_dialogue(tmp_path, monkeypatch):
    """A package on the path that brings a format along, as pip would have installed it."""
    (tmp_path / "dialogue_rows.py").write_text(
        "from vlmtune.messages import RowFormat\n"
        "def read(row, templates):\n"
        "    return [{'role': role, 'content': line} for role, line in zip(['user', 'assistant'], row['lines'])]\n"
        "FORMAT = RowFormat('dialogue', read, ('lines',))\n"
    )
    metadata = tmp_path / "dialogue_rows-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dialogue-rows\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vlmtune.formats]\ndialogue = dialogue_rows:FORMAT\nkite = sys:path\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._entry_points.cache_clear()
    yield
    plugins._entry_points.cache_clear()
    sys.modules.pop("dialogue_rows", None)


@pytest.mark.usefixtures("installed_dialogue")
def test_an_installed_package_brings_a_format_along():
    assert "dialogue" in plugins.names("vlmtune.formats")
    assert format_messages({"lines": ["Hi", "Hello"]}, format="dialogue") == [user("Hi"), assistant("Hello")]


@pytest.mark.usefixtures("installed_dialogue")
def test_an_entry_point_that_is_no_format_is_refused():
    with pytest.raises(DatasetError, match="format 'kite': its entry point is a value of type list, wanted a RowFormat"):
        format_messages({}, format="kite")


@pytest.mark.usefixtures("installed_dialogue")
def test_an_unknown_entry_point_is_named_with_the_nearest():
    with pytest.raises(LookupError, match=r"no entry point 'dialog'.* Did you mean 'dialogue'"):
        plugins.load("vlmtune.formats", "dialog")


def test_our_formats_are_known_by_their_names():
    assert list(FORMATS.values()) == [COLUMNS, OPENAI, SHAREGPT, ALPACA, PROMPT_COMPLETION]
    assert all(name == each.name for name, each in FORMATS.items())


def test_the_examples_in_the_documentation_are_true():
    page = Path(__file__).parent.parent / "docs" / "row-formats.md"
    whole = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    single = doctest.testmod(messages_module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (whole.failed, single.failed) == (0, 0)
    assert min(whole.attempted, single.attempted) > 0


def test_the_module_needs_neither_torch_nor_transformers_nor_pillow():
    code = "import sys, vlmtune.messages; print({'torch', 'transformers', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# ---- any row

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "Hi", "<image>", "a\n<image>"])
keys = st.sampled_from(["type", "text", "role", "bytes", "x"])
any_json = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2))


def mostly(strategy):
    return st.one_of(strategy, strategy, strategy, any_json)


parts = st.fixed_dictionaries(
    {"type": mostly(st.sampled_from(["text", "image", "image_url", "input_image", "video"]))},
    optional={key: mostly(st.just("a.png")) for key in ("text", "image", "image_url", "url", "base64", "bytes")},
)
contents = mostly(st.sampled_from(["Hi", "<image>\nHi"]) | st.lists(mostly(parts), max_size=3))
turns = st.tuples(mostly(contents), mostly(contents)).map(
    lambda two: [{"role": "user", "content": two[0]}, {"role": "assistant", "value": two[1]}]
)
roles = mostly(st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool"]))
loose = st.lists(mostly(st.fixed_dictionaries({}, optional={"from": roles, "role": roles, "value": contents})), max_size=4)
rows = st.fixed_dictionaries(
    {},
    optional={
        "messages": mostly(turns | loose),
        "conversations": mostly(turns | loose),
        "prompt": mostly(st.just("Hi") | turns),
        "completion": mostly(st.just("Hi") | turns),
        "instruction": mostly(st.just("Hi")),
        "input": mostly(st.just("Hi")),
        "output": mostly(st.just("Hi")),
        "image": mostly(st.just("a.png")),
        "images": mostly(st.lists(st.just("a.png"), max_size=2)),
    },
)
options = st.sampled_from(
    [{"format": name} for name in ("auto", "openai", "sharegpt", "alpaca", "prompt_completion")]
    + [{"prompt": "{instruction} <image>", "response": "{output}"}, {"prompt": "{input}", "response": "{output}"}]
)


patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


@patient
@given(rows, options, st.booleans())
def test_any_row_gives_legal_messages_or_a_dataset_error_and_stays_as_it_was(row, options, prompt_only):
    before = copy.deepcopy(row)
    try:
        messages = format_messages(row, **options, prompt_only=prompt_only)
    except DatasetError:
        messages = None
    assert repr(row) == repr(before)  # by text, for NaN is not equal to itself
    if messages is not None:
        said = [message["role"] for message in messages]
        said = said[said[0] == "system" :]
        assert said == ["user", "assistant"] * (len(said) // 2) + ["user"] * (len(said) % 2)
        assert len(said) % 2 == prompt_only
        assert all(message["content"] for message in messages)
        assert all(part["type"] in ("text", "image", "video") for m in messages for part in m["content"])
        assert all(part["image"] for m in messages for part in m["content"] if part["type"] == "image")


def containers(value):
    """The ids of all mutable containers in a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = {id(value)} if isinstance(value, dict | list) else set()
    return own.union(*map(containers, inner))


@patient
@given(rows)
def test_messages_share_no_mutable_structure_with_the_row(row):
    try:
        messages = format_messages(row)
    except DatasetError:
        return
    assert not containers(row) & containers(messages)


def test_messages_whose_text_says_where_the_pictures_stand_are_read_so() -> None:
    row = {
        "messages": [{"role": "user", "content": "Left: <image> right: <image>"}, {"role": "assistant", "content": "Cats."}],
        "images": ["a.png", "b.png"],
    }
    kinds = [part.get("image", part.get("text")) for part in format_messages(row)[0]["content"]]
    assert kinds == ["Left: ", "a.png", " right: ", "b.png"]
    with pytest.raises(DatasetError, match="2 <image> placeholders, 1 pictures"):
        format_messages({**row, "images": ["a.png"]})


def test_an_answer_that_is_only_a_picture_is_empty() -> None:
    turns = [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]
    with pytest.raises(DatasetError, match="the answer is empty in turn 2"):
        format_messages({"messages": turns})


def test_without_pictures_the_word_stays_text() -> None:
    row = {"messages": [{"role": "user", "content": "What is <image>?"}, {"role": "assistant", "content": "A tag."}]}
    assert format_messages(row)[0]["content"] == [{"type": "text", "text": "What is <image>?"}]
