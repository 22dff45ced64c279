"""What holds for any row: no picture is lost, labels are the answers, and rows read = trained on + evaluated + dropped."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import ENDS, KINDS, make_processor

from vlmtune import DatasetError, MultimodalCollator, finetune, format_messages, load_recipe
from vlmtune.batching import counted_rows, usable_rows
from vlmtune.data import Rows, Split

patient = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
FORGED = ("<|im_end|>", "<|image_pad|>", "<|eot_id|>", "[/INST]", "[IMG]", "</s>", "<image>", "<pad>")
letters = st.text("aé日 🪁", min_size=1, max_size=12).filter(str.strip).map(str.strip)
texts = st.lists(letters | st.sampled_from(FORGED), min_size=1, max_size=3).map("".join)
names = st.lists(st.integers(0, 9).map("{}.png".format), max_size=4)


# ---- format_messages


@patient
@given(
    st.lists(st.tuples(names, letters, letters), min_size=1, max_size=3),
    st.sampled_from(["parts", "places", "marks", "column"]),
)
def test_pictures_stay_in_order_and_none_is_lost(turns: list[tuple[list[str], str, str]], written: str) -> None:
    messages: list[dict[str, Any]] = []
    for seen, question, answer in turns:
        parts = [{"type": "image", "image": name} if written == "parts" else {"type": "image"} for name in seen]
        content = {
            "parts": [*parts, {"type": "text", "text": question}],
            "places": [{"type": "text", "text": question}, *parts],
            "marks": question + "<image>" * len(seen),
            "column": question,
        }[written]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    pictures = [name for seen, _, _ in turns for name in seen]
    row = {"messages": messages} | ({} if written == "parts" else {"images": pictures})
    before = json.dumps(row)
    made = format_messages(row)
    assert [part["image"] for message in made for part in message["content"] if part["type"] == "image"] == pictures
    assert [message["role"] for message in made] == ["user", "assistant"] * len(turns)
    assert [message["content"][-1]["text"] for message in made[1::2]] == [answer for _, _, answer in turns]
    assert json.dumps(row) == before


# ---- labels

COLLATORS = {kind: MultimodalCollator(make_processor(kind)) for kind in (*KINDS, "text")}
sizes = st.lists(st.tuples(st.integers(28, 60), st.integers(28, 60)), max_size=2)
conversations = st.lists(st.tuples(sizes, texts, texts), min_size=1, max_size=3)


@settings(patient, max_examples=60)
@given(st.sampled_from(list(COLLATORS)), st.lists(conversations, min_size=1, max_size=3))
def test_labels_are_the_answers_and_their_stop_tokens_and_nothing_else(
    kind: str, rows: list[list[tuple[list[tuple[int, int]], str, str]]]
) -> None:
    collator = COLLATORS[kind]
    samples: list[dict[str, Any]] = []
    for turns in rows:
        messages: list[dict[str, Any]] = []
        for seen, question, answer in turns:
            pictures = [{"type": "image", "image": Image.new("RGB", size)} for size in seen if kind != "text"]
            messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        samples.append({"messages": messages})
    batch = collator(samples)
    ids, labels = batch["input_ids"], batch["labels"]
    trained = labels != -100
    assert torch.equal(labels[trained], ids[trained])
    assert not (trained & (batch["attention_mask"] == 0)).any()
    never = collator.family.image_token_ids(collator.processor) | collator.family.video_token_ids(collator.processor)
    assert not never & set(labels[trained].tolist())
    stop = ENDS[kind][1] if kind != "text" else collator.tokenizer.eos_token
    for turns, mask, own in zip(rows, trained, ids, strict=True):
        answers = [answer + stop for _, _, answer in turns]
        assert collator.tokenizer.decode(own[mask]) == "".join(answers)
        assert int((own[mask] == collator.stop_token_id).sum()) == len(turns)  # a forged one is letters
        assert int(mask.sum()) == sum(len(answer.encode()) + 1 for _, _, answer in turns)  # a token is a byte


# ---- rows read = trained on + evaluated + dropped

GOOD = {"image": "good.png", "Product Name": "Kite", "description": "Red."}
POOL: dict[str, Any] = {  # a row, and whether it is fit to be trained on
    "good": (GOOD, True),
    "wide": ({**GOOD, "image": "wide.png"}, True),
    "without a picture": ({**GOOD, "image": None}, True),
    "long": ({**GOOD, "description": "Red. " * 30}, True),
    "empty": ({**GOOD, "description": " "}, False),
    "a list": ([1], False),
    "no file": ({**GOOD, "image": "none.png"}, False),
    "half a file": ({**GOOD, "image": "half.png"}, False),
    "a strip": ({**GOOD, "image": "strip.png"}, False),  # Qwen2-VL's processor refuses it
}
mixtures = st.lists(st.sampled_from(list(POOL)), min_size=1, max_size=8)
policies = st.fixed_dictionaries(
    {
        "on_bad_row": st.sampled_from(["raise", "drop", "drop"]),
        "on_too_long": st.sampled_from(["raise", "drop", "shrink"]),
        "train.max_length": st.integers(20, 300),
        "data.eval_rows": st.sampled_from([None, None, 1, 2]),
    }
)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], str]:
    """`write(["good", "empty"])`: a file of these rows of the pool, beside their pictures."""
    directory = tmp_path_factory.mktemp("pool")
    for name, size in (("good", (30, 30)), ("wide", (200, 100)), ("half", (200, 200)), ("strip", (9000, 3))):
        Image.effect_noise(size, 80).save(directory / f"{name}.png")
    (directory / "half.png").write_bytes((directory / "half.png").read_bytes()[:2000])

    def make(kinds: list[str]) -> str:
        path = directory / "rows.jsonl"
        path.write_text("\n".join(json.dumps(POOL[kind][0]) for kind in kinds))
        return str(path)

    return make


def row_names(rows: Rows | None) -> list[str]:
    return [rows.name(position) for position in range(len(rows))] if rows is not None else []


@settings(patient, max_examples=80)
@given(mixtures, policies)
def test_rows_read_are_trained_on_evaluated_or_dropped(
    write: Callable[[list[str]], str], kinds: list[str], policy: dict[str, Any]
) -> None:
    columns = {"prompt": "{Product Name}?", "response": "{description}", "images": "image"}
    recipe = load_recipe({"model": {"name": "a"}, "data": {"source": write(kinds), **columns}, "train": {}}, **policy)
    collator = COLLATORS["qwen2_vl"]
    collator.max_length = policy["train.max_length"]
    read = [f"row {number} of rows.jsonl" for number in range(1, len(kinds) + 1)]
    unfit = {name for name, kind in zip(read, kinds, strict=True) if not POOL[kind][1]}
    split, lengths, refused = Split(Rows([], "", Path(), {}, []), None), [0], ""
    try:
        split, lengths = counted_rows(recipe, usable_rows(recipe, 0, check_images=True), collator)
    except DatasetError as error:
        refused = str(error)
    finally:
        collator.max_length = None
    if refused:
        assert any(name in refused for name in read) or "leave none to train on" in refused
        return
    assert sorted([*row_names(split.train), *row_names(split.held_out), *split.dropped]) == sorted(read)
    assert len(lengths) == len(split.train) > 0
    assert max(lengths) <= policy["train.max_length"]
    assert unfit <= set(split.dropped)
    if policy["on_bad_row"] == "raise":
        assert not unfit
        assert policy["on_too_long"] == "drop" or not split.dropped


@settings(patient, max_examples=4)
@given(st.lists(st.sampled_from(["good", "long", "empty", "a strip"]), max_size=4), st.integers(0, 2))
def test_metrics_account_for_every_row_of_the_file(
    recipe: Callable[..., dict[str, Any]], write: Callable[[list[str]], str], kinds: list[str], held_out: int
) -> None:
    kinds = ["good", *kinds, "good", "good", "good"]
    with tempfile.TemporaryDirectory() as directory:
        options = {"on_bad_row": "drop", "on_too_long": "drop", "eval.samples": 0, "train.max_steps": 1}
        more = {"train.output_dir": f"{directory}/run", "train.max_length": 150, "data.eval_rows": held_out or None}
        metrics, told = None, ""
        try:
            run = finetune(recipe(**{"data.source": write(kinds), "train.save_strategy": "no", **options, **more}))
            metrics = json.loads((run.adapter_dir / "metrics.json").read_text())
        except DatasetError as error:
            told = str(error)
    if metrics is None:  # all that were held out fell out
        assert held_out
        assert "(no others are left):\n  row " in told
        return
    assert metrics["train_rows"] + metrics["held_out_rows"] + len(metrics["dropped_rows"]) == len(kinds)
    assert len(metrics["dropped_rows"]) == len(kinds) - kinds.count("good")
