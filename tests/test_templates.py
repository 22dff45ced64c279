"""Our chat templates against the encoders of the formats' makers (tests/oracles.py), on the real vocabularies."""

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from oracles import ids_by_oracle
from PIL import Image
from real_vocab import cache_directory, checkpoint_template, real_processor, trl_template
from transformers.utils.chat_template_utils import render_jinja_template

FAMILIES = ["qwen2_vl", "mllama", "pixtral"]
TEMPLATES = {
    name: (Path(__file__).parents[1] / f"src/vlmtune/families/{name}.jinja").read_text(encoding="utf-8")
    for name in ["mllama", "pixtral"]
} | {"qwen2_vl": trl_template("qwen2_5_vl_training")}
STOP = {"qwen2_vl": "<|im_end|>\n", "mllama": "<|eot_id|>", "pixtral": "</s>"}  # TRL's template trains on the \n, too

Message = dict[str, Any]


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def user(*parts: Any) -> Message:
    """A user turn: one string as it is, or typed parts, a (width, height) standing for a picture of that size."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}
    return {"role": "user", "content": typed(*parts)}


def assistant(content: Any) -> Message:
    return {"role": "assistant", "content": content}


def typed(*parts: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "size": list(p)} for p in parts]


SMALL, WIDE, TALL = (64, 48), (200, 33), (17, 130)
CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [user("What is this?"), assistant("A red mug.")],
    "one turn in parts": [user("What is this?", ""), assistant(typed("A red mug."))],
    "several turns": [
        user("Hi"), assistant("Hello."), user("And?"), assistant("Nothing."), user("Bye"), assistant("Bye!"),
    ],
    "a system message": [system("Be brief."), user("What is this?"), assistant("A mug.")],
    "a system message in parts": [system(typed("Be brief.")), user("What is this?"), assistant("A mug.")],
    "a system message and several turns": [
        system("Be brief."), user(SMALL, "What?"), assistant("A mug."), user("Sure?"), assistant("Yes."),
    ],
    "a system message before a picture": [system("You sell mugs."), user(SMALL, "Describe it."), assistant("A mug.")],
    "a picture": [user(SMALL, "Describe it."), assistant("A mug.")],
    "a picture alone": [user(SMALL), assistant("A mug.")],
    "pictures of different sizes": [user(SMALL, WIDE, TALL, (16, 16), "Compare."), assistant("Four mugs.")],
    "pictures between texts": [user("Is", WIDE, "like", TALL, "?"), assistant("No.")],
    "two pictures after a text": [user("Which is larger?", SMALL, WIDE), assistant("The second.")],
    "pictures in two turns": [user(SMALL, "What?"), assistant("A mug."), user(TALL, "And this?"), assistant("A vase.")],
    "a picture as large as the limit": [user((1024, 700), "What?"), assistant("A mug.")],
    "a picture larger than the limit": [user((1500, 1000), "What?"), assistant("A mug.")],
    "other scripts": [
        system("Réponds brièvement — 簡潔に。"),
        user(SMALL, "这是什么？ Что это? 🦄👩‍👩‍👧"),
        assistant("Ça, c’est un «mug» ☕️ 杯子 กา"),
    ],
    "spaces around texts": [user(SMALL, "  What is\tthis?   "), assistant("   A mug,\n\n  red.")],
    "newlines at the end": [system("Be brief.\n"), user(SMALL, "What is this?\n\n"), assistant("- a mug\n- red\n\n")],
    "code and numbers": [user(SMALL, "12345678 /* x */ it's"), assistant("```python\n    return {'a': 1}\n```\n/")],
}  # fmt: skip
MLLAMA = CONVERSATIONS | {
    "a picture after a text": [user("Describe", SMALL), assistant("A mug.")],
    "spaces at the end of an answer": [user("What?"), assistant("A mug.  ")],
    "a user turn after another": [user("What?"), user("Well?"), assistant("A mug.")],
}
PIXTRAL = CONVERSATIONS | {
    "a picture after a text, which moves before it": [user("Describe", "it.", SMALL), assistant("A mug.")],
    "texts beside each other": [
        system(typed("Be brief.", "Be kind.")), user(SMALL, "a", "", "b", WIDE, "c"), assistant(typed("A", "mug.")),
    ],
    "spaces at the end of an answer, which are cut": [user("What?"), assistant("A mug.\n  ")],
    "newlines at the start": [user(SMALL, "\nWhat?"), assistant("\n\nA mug.")],
}  # fmt: skip


# Where an encoder by parts and a template of text must differ: (conversation, why). Same text, other ids.
DEVIATIONS = {
    "mllama": {
        # Meta encodes the header's two newlines by themselves; in a text they fuse with a newline that follows. The
        # hub's template avoids it by trimming every text.
        "a newline at the start": [user("\nWhat?"), assistant("A mug.")],
        # Meta encodes each text part by itself.
        "texts beside each other": [user("Descr", "ibe it."), assistant("A mug.")],
    },
    "pixtral": {
        # Mistral encodes the system message and its empty line by itself, if the user's turn is in parts.
        "a system message before a text that starts with a newline": [
            system("Be brief."), user("\nCompare", SMALL, WIDE), assistant("Two mugs."),
        ],
    },
}  # fmt: skip
AGREED = {"mllama": MLLAMA, "pixtral": PIXTRAL}
AGREED_CASES = [(family, name) for family, conversations in AGREED.items() for name in conversations]
DEVIATION_CASES = [(family, name) for family, conversations in DEVIATIONS.items() for name in conversations]

# A side longer than 1024 brings the other to a rounded number of pixels in mistral-common, to a floored one in
# transformers: 2000 x 1283 becomes 1024 x 656.9 and so 42 or 41 rows of patches. Some large pictures differ by a row.
ROUNDED = {"a picture of 2000 x 1283": [user((2000, 1283), "What?"), assistant("A mug.")]}


@cache
def processor(family: str) -> Any:
    return real_processor(family)


@cache
def oracle(family: str) -> dict[str, list[int]]:
    whole = AGREED[family] | DEVIATIONS[family] | ROUNDED
    prompts = {f"{name}, prompt": messages[:-1] for name, messages in AGREED[family].items()}
    return ids_by_oracle(family, whole | prompts, cache_directory())


def with_pictures(messages: list[Message]) -> list[Message]:
    def part(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image", "image": Image.new("RGB", part["size"], "teal")} if part["type"] == "image" else part

    return [m if isinstance(m["content"], str) else m | {"content": [part(p) for p in m["content"]]} for m in messages]


def encoded(family: str, messages: list[Message], template: str | None = None, **options: Any) -> Any:
    template = template or TEMPLATES[family]
    return processor(family).apply_chat_template(
        with_pictures(messages), chat_template=template, tokenize=True, return_dict=True, **options
    )


def ids(family: str, messages: list[Message], **options: Any) -> list[int]:
    return list(encoded(family, messages, **options)["input_ids"][0])


def rendered(template: str, messages: list[Message], **options: Any) -> str:
    return render_jinja_template([messages], chat_template=template, **options)[0][0]


# The formats, to be read by eye. No network.


def test_llama_format() -> None:
    messages = [system("Be brief."), user(SMALL, "What?"), assistant("A mug.")]
    assert rendered(TEMPLATES["mllama"], messages, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<|image|>What?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA mug.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_pixtral_format() -> None:
    messages = [system("Be brief."), user(SMALL, "What?"), assistant("A mug."), user("Sure?", SMALL), assistant("Yes.")]
    assert rendered(TEMPLATES["pixtral"], messages, add_generation_prompt=True) == (
        "<s>[INST][IMG]What?[/INST]A mug.</s>[INST]Be brief.\n\n[IMG]Sure?[/INST]Yes.</s>"
    )


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([assistant("Hi.")], "found assistant where user was expected"),
        ([user("a"), user("b")], "found user where assistant was expected"),
        ([user("a"), assistant("b"), assistant("c")], "found assistant where user was expected"),
        ([user("a"), system("b"), user("c")], "found system where assistant was expected"),
        ([system("a")], "needs a user message"),
        ([user("a"), assistant("")], "an assistant message is empty"),
        ([system(typed(SMALL)), user("a")], "in a message of the system"),
        ([user("a"), assistant(typed(SMALL))], "in a message of the assistant"),
        ([user("a"), {"role": "assistant"}], "has no content"),
        ([{"role": "user", "content": [{"type": "video"}]}], "must be a text or"),
    ],
)
def test_pixtral_refuses_what_its_format_forbids(messages: list[Message], sentence: str) -> None:
    with pytest.raises(TemplateError, match=sentence):
        rendered(TEMPLATES["pixtral"], messages)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([{"role": "critic", "content": "42"}], "found critic"),
        ([user("a"), {"role": "assistant"}], "has no content"),
        ([{"role": "user", "content": [{"type": "video"}]}], "must be a text or an image"),
    ],
)
def test_llama_refuses_what_it_would_drop(messages: list[Message], sentence: str) -> None:
    with pytest.raises(TemplateError, match=sentence):
        rendered(TEMPLATES["mllama"], messages)


@pytest.mark.parametrize(("family", "digest"), [("mllama", "f5247485bbcf713f"), ("pixtral", "1eba7bd43ce0fa91")])
def test_rows_without_tools_have_the_bytes_that_they_had_before_there_were_any(family: str, digest: str) -> None:
    conversations = (AGREED[family] | DEVIATIONS[family]).values()
    prompts = [messages[:-1] for messages in conversations]
    texts = [rendered(TEMPLATES[family], messages) for messages in conversations]
    texts += [rendered(TEMPLATES[family], messages, add_generation_prompt=True) for messages in prompts]
    assert sha256("\0".join(texts).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"add_vision_id": True}])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_qwen2_vl_training_template_renders_the_bytes_of_the_checkpoints(name: str, options: dict[str, bool]) -> None:
    training, checkpoint = TEMPLATES["qwen2_vl"], checkpoint_template("qwen2_vl")
    messages = CONVERSATIONS[name]
    assert rendered(training, messages, **options) == rendered(checkpoint, messages, **options)


@pytest.mark.parametrize("family", ["mllama", "pixtral"])
def test_the_generation_markers_render_nothing(family: str) -> None:
    for messages in AGREED[family].values():
        assert rendered(TEMPLATES[family], messages) == rendered(checkpoint_template(family), messages)


# The same ids as the oracle's.


@pytest.mark.network
@pytest.mark.parametrize(("family", "name"), AGREED_CASES)
def test_a_conversation_has_the_ids_of_its_makers_encoder(family: str, name: str) -> None:
    assert ids(family, AGREED[family][name]) == oracle(family)[name]


@pytest.mark.network
@pytest.mark.parametrize(("family", "name"), AGREED_CASES)
def test_a_prompt_has_the_ids_of_its_makers_encoder(family: str, name: str) -> None:
    prompt = ids(family, AGREED[family][name][:-1], add_generation_prompt=True)
    assert prompt == oracle(family)[f"{name}, prompt"]


@pytest.mark.network
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_the_start_of_its_conversation(family: str) -> None:
    for messages in CONVERSATIONS.values():
        prompt = ids(family, messages[:-1], add_generation_prompt=True)
        assert ids(family, messages)[: len(prompt)] == prompt


@pytest.mark.network
@pytest.mark.parametrize(("family", "name"), DEVIATION_CASES)
def test_text_that_a_template_cannot_encode_by_parts_is_the_same_text_in_other_ids(family: str, name: str) -> None:
    ours, theirs = ids(family, DEVIATIONS[family][name]), oracle(family)[name]
    assert ours != theirs
    assert processor(family).decode(ours) == processor(family).decode(theirs)


@pytest.mark.network
def test_a_large_picture_may_lose_one_row_of_patches_to_rounding() -> None:
    (name, messages) = next(iter(ROUNDED.items()))
    row = 64 + 1  # 1024 / 16 patches and [IMG_BREAK]
    assert len(oracle("pixtral")[name]) - len(ids("pixtral", messages)) == row


@pytest.mark.network
@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("mllama", r"<|end_header_id|>\n\n", r"<|end_header_id|>\n"),
        ("pixtral", "'[INST]'", "'[INST] '"),
        ("pixtral", "~ '</s>'", "~ ' </s>'"),
    ],
)
def test_the_oracle_sees_a_space_or_newline_too_few_or_many(family: str, old: str, new: str) -> None:
    broken = TEMPLATES[family].replace(old, new)
    assert broken != TEMPLATES[family]
    assert ids(family, CONVERSATIONS["one turn"], template=broken) != oracle(family)["one turn"]


# What is trained on.


def trained_text(family: str, messages: list[Message]) -> str:
    batch = encoded(family, messages, return_assistant_tokens_mask=True)
    pairs = zip(batch["input_ids"][0], batch["assistant_masks"][0], strict=True)
    return processor(family).decode([int(i) for i, trained in pairs if trained])


@pytest.mark.network
@pytest.mark.parametrize("pictures", [0, 1, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_assistant_mask_is_the_answers_and_their_stop_tokens(family: str, pictures: int) -> None:
    sizes = [SMALL, WIDE, TALL, (16, 16), (120, 90)][:pictures]
    messages = [system("Sé breve."), user(*sizes, "这是什么？", ""), assistant("Ça, un «mug» ☕️\n - 杯子")]
    messages += [user("And?", *sizes, "Sure?"), assistant(typed(" Yes: 3.5 kg 🦄."))]
    stop = STOP[family]
    assert trained_text(family, messages) == f"Ça, un «mug» ☕️\n - 杯子{stop} Yes: 3.5 kg 🦄.{stop}"


@pytest.mark.network
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_assistant_mask_of_every_conversation_is_its_answers(family: str, name: str) -> None:
    answers = [m["content"] for m in CONVERSATIONS[name] if m["role"] == "assistant"]
    texts = [a if isinstance(a, str) else "".join(part["text"] for part in a) for a in answers]
    assert trained_text(family, CONVERSATIONS[name]) == "".join(text + STOP[family] for text in texts)


@pytest.mark.network
@pytest.mark.parametrize(
    ("family", "trained"),
    [("qwen2_vl", "\n\nA mug.<|im_end|>\n"), ("mllama", "\n\n\nA mug.<|eot_id|>"), ("pixtral", "\nA mug.</s>")],
)
def test_an_answer_that_starts_with_a_newline_fuses_with_a_header_that_ends_in_one(family: str, trained: str) -> None:
    assert trained_text(family, [user("What?"), assistant("\nA mug.")]) == trained
